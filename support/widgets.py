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
    boxes = {name: _control(name, spec) for name, spec in controls.items()}

    def now() -> dict:
        return {name: box.value for name, box in boxes.items()}

    def describe() -> str:
        return alt(**now()) if callable(alt) else alt

    def show(_=None) -> bytes:
        try:
            image = png(draw(**now()))
        except Exception as error:
            picture.value = f"<p>This setting cannot be drawn: {escape(str(error))}</p>"
            raise
        source = base64.b64encode(image).decode()
        picture.value = f'<img alt="{escape(describe())}" src="data:image/png;base64,{source}">'
        return image

    picture = ipywidgets.HTML()
    image = show()
    for box in boxes.values():
        box.observe(show, names="value")
    panel = ipywidgets.VBox([*(_with_number(name, box) for name, box in boxes.items()), picture])
    panel.describe = describe
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


def progress(items: Iterable, description: str = "", **options) -> tqdm:
    """Return `items` in a progress bar, silent where nobody watches (COURSE_QUIET is set)."""
    quiet = bool(os.environ.get("COURSE_QUIET"))
    return tqdm(items, desc=description, disable=quiet, leave=False, **options)


def _control(name: str, spec):
    if isinstance(spec, list):
        return ipywidgets.Dropdown(options=spec, value=spec[0])
    start, low, high, *step = spec
    kind = (
        ipywidgets.FloatSlider if any(isinstance(x, float) for x in spec) else ipywidgets.IntSlider
    )
    options = {"step": step[0]} if step else {}
    return kind(value=start, min=low, max=high, continuous_update=False, readout=False, **options)


def _with_number(name: str, box) -> ipywidgets.Widget:
    """Return the control with its name, and a slider with a box to type the number into."""
    label = ipywidgets.Label(name.replace("_", " "), layout={"width": "9em"})
    if isinstance(box, ipywidgets.Dropdown):
        return ipywidgets.HBox([label, box])
    kind = (
        ipywidgets.BoundedFloatText
        if isinstance(box, ipywidgets.FloatSlider)
        else ipywidgets.BoundedIntText
    )
    number = kind(value=box.value, min=box.min, max=box.max, step=box.step, layout={"width": "6em"})
    ipywidgets.link((box, "value"), (number, "value"))
    return ipywidgets.HBox([label, box, number])
