"""The controls without a browser: what is shown, and what moving one does."""

import base64
from html import unescape

import ipywidgets
import pytest
from matplotlib.figure import Figure

from support import widgets

# There is no other way from what is displayed to the widget behind it.
pytestmark = pytest.mark.filterwarnings("ignore:Widget.widgets is deprecated")
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def explore(monkeypatch):
    """Return `explore`, made to return the panel and the bundle that it displays."""
    shown = []
    monkeypatch.setattr(widgets, "display", lambda bundle, **_: shown.append(bundle))

    def run(*args, **controls):
        widgets.explore(*args, **controls)
        bundle = shown.pop()
        assert not shown
        return ipywidgets.Widget.widgets[bundle[VIEW]["model_id"]], bundle

    return run


class Draw:
    """A picture with as many points as asked for, that remembers what it was asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, **values) -> Figure:
        self.calls.append(values)
        if values.get("n") == 9:
            raise ValueError("9 is <too> many")
        figure = Figure(figsize=(1, 1))
        figure.subplots().set_title(str(values))
        return figure


def parts(panel):
    """Return the named controls of a panel, its sliders, and the HTML that it shows below them."""
    *rows, picture = panel.children
    named = [row.children[0] if isinstance(row, ipywidgets.HBox) else row for row in rows]
    sliders = [row.children[1] for row in rows if isinstance(row, ipywidgets.HBox)]
    return named, sliders, picture


def test_shows_a_live_panel_and_a_picture_and_words_for_where_there_is_no_kernel(explore):
    panel, bundle = explore(Draw(), "a picture", n=(4, 1, 9))
    assert set(bundle) == {VIEW, "image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "a picture"
    assert bundle["image/png"] in parts(panel)[2].value


def test_moving_a_slider_redraws_and_the_words_follow(explore):
    draw = Draw()
    panel, bundle = explore(draw, lambda n: f'"{n}" <points>', n=(4, 1, 9))
    (number,), (slider,), picture = parts(panel)
    before = picture.value
    slider.value = 7
    assert draw.calls == [{"n": 4}, {"n": 7}]
    assert picture.value != before
    assert 'alt="&quot;7&quot; &lt;points&gt;"' in picture.value
    assert bundle["text/plain"] == '"4" <points>'
    assert number.value == 7


def test_typing_a_number_moves_the_slider_and_redraws_once(explore):
    draw = Draw()
    (number,), (slider,), _ = parts(explore(draw, "…", n=(4, 1, 8))[0])
    number.value = 6
    assert slider.value == 6 and draw.calls == [{"n": 4}, {"n": 6}]
    number.value = 100  # beyond the end is the end
    assert number.value == slider.value == 8


def test_a_float_comes_without_the_noise_of_its_steps(explore):
    draw = Draw()
    (number,), (slider,), _ = parts(explore(draw, "…", t=(1.0, 0.1, 2.0, 0.1))[0])
    assert isinstance(slider, ipywidgets.FloatSlider) and slider.step == number.step == 0.1
    slider.value = 1.2000000000000002
    assert draw.calls[-1] == {"t": 1.2} and number.value == 1.2


def test_a_list_becomes_choices_of_which_the_first_is_chosen(explore):
    draw = Draw()
    (choices,), (), _ = parts(explore(draw, "…", shape=["bars", "line"])[0])
    choices.value = "line"
    assert draw.calls == [{"shape": "bars"}, {"shape": "line"}]


def test_a_text_becomes_a_box_to_type_into(explore):
    draw = Draw()
    (box,), (), picture = parts(explore(draw, lambda said: f"of {said}", said="hello")[0])
    assert isinstance(box, ipywidgets.Text) and not box.continuous_update
    box.value = "<good> bye"
    assert draw.calls == [{"said": "hello"}, {"said": "<good> bye"}]
    assert 'alt="of &lt;good&gt; bye"' in picture.value


def test_every_control_has_a_name_that_fits(explore):
    panel, _ = explore(Draw(), "…", n=(1, 0, 3), number_of_words=(1, 0, 3), shape=["bars"])
    named, _, _ = parts(panel)
    assert [box.description for box in named] == ["n", "number of words", "shape"]
    assert {box.style.description_width for box in named} == {"16ch"}


@pytest.mark.parametrize("move", ["slider", "number"])
def test_what_cannot_be_drawn_is_said_in_the_place_of_the_picture(explore, move):
    (number,), (slider,), picture = parts(explore(Draw(), "…", n=(4, 1, 9))[0])
    with pytest.raises(ValueError, match="too"):
        {"slider": slider, "number": number}[move].value = 9
    assert "This setting cannot be drawn: 9 is <too> many" in unescape(picture.value)
    assert "<too>" not in picture.value and "<img" not in picture.value
    assert slider.value == number.value == 9  # what is shown is what was asked for
    slider.value = 3
    assert "<img" in picture.value


def test_words_that_fail_are_told_too(explore):
    (_,), (slider,), picture = parts(explore(Draw(), lambda n: ["one"][n], n=(0, 0, 3))[0])
    with pytest.raises(IndexError):
        slider.value = 2
    assert "This setting cannot be drawn" in picture.value


def test_what_cannot_be_drawn_at_first_fails_the_cell(explore):
    with pytest.raises(ValueError, match="too"):
        explore(Draw(), "…", n=(9, 1, 9))


def test_progress_yields_every_item_and_says_nothing_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.setenv("COURSE_QUIET", "1")
    assert list(widgets.progress(range(3), "training")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_progress_is_seen_by_a_person(monkeypatch, capfd):
    monkeypatch.delenv("COURSE_QUIET", raising=False)
    assert list(widgets.progress(range(3), "training", mininterval=0)) == [0, 1, 2]
    assert "training" in capfd.readouterr().err
