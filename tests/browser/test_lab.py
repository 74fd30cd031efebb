"""Run every chapter in a real JupyterLab, as a reader would, and turn each of its controls."""

import re
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import TimeoutError as TookTooLong
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHAPTERS = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
RUN_MS, STEP_MS = 1_200_000, 60_000  # a whole notebook; one click, or one picture

BOOK = "window.jupyterapp?.shell?.currentWidget"
IDLE = f"{BOOK}?.sessionContext?.session?.kernel?.status == 'idle'"
# The outputs that the file came with go first, so that what is read afterwards is of this run.
# After an expected error JupyterLab calls the run ended while later cells still wait their turn;
# so the kernel is asked for one thing more, which it answers after all of them.
RUN = f"""async () => {{
    await jupyterapp.commands.execute('notebook:clear-all-cell-outputs');
    const kernel = {BOOK}.sessionContext.session.kernel;
    jupyterapp.commands.execute('notebook:run-all-cells')
        .finally(() => kernel.requestExecute({{ code: '', silent: true }}).done)
        .finally(() => {{ window.ended = true; }});
}}"""
DONE = f"() => window.ended && {IDLE}"
CODE_CELLS = f"""() => {BOOK}.content.widgets.map((cell, index) => ({{
    index, type: cell.model.type, source: cell.model.sharedModel.source,
    count: cell.model.executionCount, tags: cell.model.getMetadata('tags') ?? [],
    errors: (cell.model.outputs?.toJSON() ?? []).filter(out => out.output_type == 'error')
}})).filter(cell => cell.type == 'code')"""
# A cell that is off the screen may not be in the page at all.
SHOW = f"""index => {{
    const book = {BOOK}.content;
    book.widgets[index].node.id = 'cell-' + index;
    return book.scrollToItem(index); }}"""
OTHER_PICTURE = """([panel, before]) => {
    const image = document.querySelector(panel + ' img');
    return !image || image.src != before; }"""


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_and_its_controls_work(chapter, browser, lab):
    url, token = lab
    page = browser.new_page()
    page.set_default_timeout(STEP_MS)
    asked = []
    page.context.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    try:
        page.goto(f"{url}/lab/tree/notebooks/{chapter}?token={token}&reset")
        page.wait_for_function(IDLE)
        page.evaluate(RUN)
        page.wait_for_function(DONE, timeout=RUN_MS)
        cells = page.evaluate(CODE_CELLS)
        _assert_all_ran(cells)
        assert asked  # what the page asks for is being heard
        panels = [c["index"] for c in cells if re.search(r"^explore\(", c["source"], re.MULTILINE)]
        assert panels, "no cell shows a control to turn: no line begins with 'explore('"
        for index in panels:
            _turn_controls(page, index)
    finally:
        page.evaluate(f"() => {BOOK}?.sessionContext?.shutdown()")  # a kernel may hold gigabytes
        page.close()
    sent = [address for address in asked if not address.startswith(("data:", "blob:"))]
    strangers = [address for address in sent if urlsplit(address).hostname != "127.0.0.1"]
    assert not strangers, f"the page asked another machine for {strangers}"


def _assert_all_ran(cells: list[dict]) -> None:
    for cell in cells:
        for error in cell["errors"]:
            raised = f"cell {cell['index']} raised {error['ename']}: {error['evalue']}"
            assert "raises-exception" in cell["tags"], raised
    for count, cell in enumerate(cells, start=1):
        assert cell["count"] == count, f"cell {cell['index']} was not run in its turn"


def _turn_controls(page, index: int) -> None:
    """Use each slider and its number box, each list and each text box; see the picture follow."""
    page.evaluate(SHOW, index)
    panel = page.locator(f"#cell-{index} .widget-vbox")
    panel.locator("img").wait_for()
    sliders = panel.locator(".noUi-handle[role=slider]").all()
    # Found by role and name: a control that a screen reader could not name is not found.
    numbers = panel.get_by_role("spinbutton", name=re.compile(r"\w")).all()
    lists = panel.get_by_role("combobox", name=re.compile(r"\w")).all()
    texts = panel.get_by_role("textbox", name=re.compile(r"\w")).all()
    assert sliders or lists or texts, f"cell {index}: no control in the panel"
    assert len(numbers) == len(sliders), f"cell {index}: a slider without a named number box"
    assert len(lists) == panel.locator("select").count(), f"cell {index}: a list without a name"
    for slider, number in zip(sliders, numbers, strict=True):
        start, top = number.input_value(), number.get_attribute("max")
        key = "ArrowLeft" if float(start) == float(top) else "ArrowRight"
        with _new_picture(page, index, f"{key} on the slider"):
            slider.press(key)
        expect(number).not_to_have_value(start, timeout=STEP_MS)
        with _new_picture(page, index, f"typing {start} into the number box"):
            number.fill(start)
            number.press("Enter")
    for choices in lists:
        with _new_picture(page, index, "another choice from the list"):
            choices.select_option(index=1)  # the first is chosen already
    for text in texts:
        with _new_picture(page, index, "typing another text"):
            text.fill("See you at eight")
            text.press("Enter")


@contextmanager
def _new_picture(page, index: int, action: str):
    """Expect that what is done inside brings another picture, with words for it."""
    panel = f"#cell-{index} .widget-vbox"
    image = page.locator(f"{panel} img")
    before = image.get_attribute("src")
    yield
    try:
        page.wait_for_function(OTHER_PICTURE, arg=[panel, before])
    except TookTooLong:
        pytest.fail(f"cell {index}: {action} left the picture as it was")
    assert image.count() == 1, f"cell {index}: after {action}: {page.locator(panel).inner_text()}"
    assert (image.get_attribute("alt") or "").strip(), f"cell {index}: no alt text after {action}"
