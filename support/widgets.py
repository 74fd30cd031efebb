"""Controls to turn, and progress to watch."""

import base64
import os
from collections.abc import Callable, Iterable
from html import escape

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from support.plots import png


def explore(draw: Callable[..., Figure], alt: str | Callable[..., str], **controls) -> None:
    """Show `draw(**values)` with a control for each argument, redrawn whenever one is moved.

    Where nobody can turn a control (GitHub, print, CI) the page shows the first picture instead.

    Args:
        draw: makes a matplotlib Figure from the controls' values.
        alt: what the picture shows, in words: a text, or a function of the values.
        controls: for each argument of `draw` either `(start, low, high)` or
            `(start, low, high, step)` for a number, or a list of choices, the first chosen.
    """
    width = f"{max(map(len, controls), default=0) + 1}ch"
    boxes = {name: _control(spec) for name, spec in controls.items()}
    rows = [_row(name, box, width) for name, box in boxes.items()]

    def now() -> dict:
        return {name: _plain(box.value) for name, box in boxes.items()}

    def describe() -> str:
        return alt(**now()) if callable(alt) else alt

    def show(_=None) -> bytes:
        try:
            image, words = png(draw(**now())), describe()
        except Exception as error:
            reason = escape(str(error))
            picture.value = f'<p role="alert">This setting cannot be drawn: {reason}</p>'
            raise
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        picture.value = f'<img alt="{escape(words)}" style="max-width: 100%" src="{source}">'
        return image

    picture = ipywidgets.HTML()
    image = show()
    for box in boxes.values():
        box.observe(show, names="value")
    panel = ipywidgets.VBox([*rows, picture])
    bundle = {
        "application/vnd.jupyter.widget-view+json": {
            "model_id": panel.model_id,
            "version_major": 2,
            "version_minor": 0,
        },
        "image/png": base64.b64encode(image).decode(),
        "text/plain": describe(),
    }
    display(bundle, metadata={"image/png": {"alt": describe()}}, raw=True)


def chat_box(answer: Callable[[list[dict]], Iterable[str]], first: str) -> list[dict]:
    """Show a box to talk to a model, after a first exchange; return the conversation, which grows.

    Args:
        answer: the conversation so far → the pieces of the next answer, as they come.
        first: what is asked first; where there is no kernel, the page shows this exchange.
    """
    box, talk = ipywidgets.Text(value=first, description="you"), ipywidgets.HTML()
    button, messages = ipywidgets.Button(description="Send"), []

    def say() -> str:
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def send(_=None) -> None:
        messages.append({"role": "user", "content": box.value})
        pieces = answer([*messages])
        messages.append({"role": "assistant", "content": ""})
        for piece in pieces:
            messages[-1]["content"] += piece
            talk.value = escape(say()).replace("\n", "<br>")
        box.value = ""

    send()
    button.on_click(send)
    panel = ipywidgets.VBox([talk, box, button])
    view = {"model_id": panel.model_id, "version_major": 2, "version_minor": 0}
    display({"application/vnd.jupyter.widget-view+json": view, "text/plain": say()}, raw=True)
    return messages


def progress(items: Iterable, description: str = "", **options) -> tqdm:
    """Return `items` in a progress bar, silent where nobody watches (COURSE_QUIET is set)."""
    quiet = bool(os.environ.get("COURSE_QUIET"))
    return tqdm(items, desc=description, disable=quiet, leave=False, **options)


def _control(spec):
    if isinstance(spec, list):
        return ipywidgets.Dropdown(options=spec, value=spec[0])
    start, low, high, *step = spec
    kind = (
        ipywidgets.FloatSlider if any(isinstance(x, float) for x in spec) else ipywidgets.IntSlider
    )
    options = {"step": step[0]} if step else {}
    return kind(value=start, min=low, max=high, continuous_update=False, readout=False, **options)


def _row(name: str, box, width: str) -> ipywidgets.Widget:
    """Return the control with its name, and a slider with a box to type the number into."""
    named, row = box, box
    if not isinstance(box, ipywidgets.Dropdown):
        kind = (
            ipywidgets.BoundedFloatText
            if isinstance(box, ipywidgets.FloatSlider)
            else ipywidgets.BoundedIntText
        )
        named = kind(value=box.value, min=box.min, max=box.max, step=box.step)
        ipywidgets.link((box, "value"), (named, "value"), transform=(_plain, _plain))
        row = ipywidgets.HBox([named, box])
    # A description is a name for a screen reader too; a slider cannot have one that is read out.
    named.description = named.tooltip = name.replace("_", " ")
    named.style.description_width = width
    named.layout.width = f"calc({width} + {'16em' if named is box else '6em'})"
    return row


def _plain(value):
    """Return 1.2 where a slider's arithmetic left 1.2000000000000002."""
    return round(value, 12) if isinstance(value, float) else value
