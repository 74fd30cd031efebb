"""The pictures show the numbers that they were given."""

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from support import plots


def test_lines_bars_and_points_carry_their_data():
    axes = plots.plot_lines({"a": ([1, 2], [3, 4]), "b": ([1], [5])}, "x", "y", x_log=True).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[3, 4], [5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "x", "y")
    axes = plots.plot_bars({"long": 12.34, "short": 1.0}, "n").axes[0]
    assert [round(bar.get_width(), 2) for bar in axes.patches] == [12.34, 1.0]
    assert {"12.3", "1.0"} <= {text.get_text() for text in axes.texts}
    axes = plots.plot_points(np.eye(3)[:, :2], ["p", "q", "r"], ["g", "h", "g"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["p", "r", "q"]
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 3


def test_several_runs_are_a_mean_in_a_band():
    axes = plots.plot_lines({"runs": ([1, 2], [[3, 4], [5, 8]])}, "x", "y").axes[0]
    assert list(axes.lines[0].get_ydata()) == [4, 6]
    corners = axes.collections[0].get_paths()[0].vertices.tolist()
    assert {(x, y) for x, y in corners} == {(1, 3), (1, 5), (2, 4), (2, 8)}


def test_stacked_bars_stand_end_to_end_and_show_their_sum():
    rows = {"small": {"a": 1.0, "b": 2.0}, "large": {"a": 4.0, "c": 8.5}}
    figure = plots.plot_stacked(rows, "n", decimals=1)
    axes = figure.axes[0]
    ends = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert ends == [(0, 1), (0, 4), (1, 2), (4, 0), (3, 0), (4, 8.5)]
    assert [text.get_text() for text in axes.texts] == ["3.0", "12.5"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


def test_heatmap_has_zero_in_the_middle():
    image = plots.plot_heatmap(np.array([[1.0, -3.0]]), "x", "y").axes[0].images[0]
    assert image.get_clim() == (-3, 3)


def test_weights_are_written_into_their_cells():
    axes = plots.plot_weights(np.array([[1, 0], [0.25, 0.75]]), ["a", "b"], ["c", "d"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "0", ".25", ".75"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["c", "d"]
    assert axes.images[0].get_array().tolist() == [[1, 0], [0.25, 0.75]]
    assert not plots.plot_weights(np.eye(15), "a" * 15, "a" * 15).axes[0].texts  # no room


def test_tokens_are_all_drawn_with_their_spaces():
    axes = plots.plot_tokens(["To", " be", "\n", "x" * 70, "y" * 20]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["To", "␣be", "⏎", "x" * 70, "y" * 20]
    assert len({text.get_position()[1] for text in axes.texts}) == 3


def test_marked_tokens_are_bold_and_orange_and_the_others_white():
    axes = plots.plot_tokens(["a", " b", "c"], marked=[False, True, True]).axes[0]
    assert [text.get_weight() for text in axes.texts] == ["normal", "bold", "bold"]
    colors = [to_hex(box.get_facecolor()).upper() for box in axes.patches]
    assert colors == ["#FFFFFF", plots.PALE[1], plots.PALE[1]]


def test_panels_share_their_x_axis_and_carry_their_data():
    axes = plots.plot_panels({"a": [1, 2, 3], "b": {"p": [4, 5], "q": [6]}}, "step").axes
    assert [list(line.get_ydata()) for ax in axes for line in ax.lines] == [[1, 2, 3], [4, 5], [6]]
    assert [ax.get_ylabel() for ax in axes] == ["a", "b"] and axes[1].get_xlabel() == "step"
    assert list(axes[0].lines[0].get_xdata()) == [1, 2, 3]


def test_windows_show_the_target_one_to_the_right():
    axes = plots.plot_windows(list("abcdef"), context_length=3, stride=2).axes[0]
    boxes = [patch.get_x() for patch in axes.patches]
    assert [round(x - 0.04) for x in boxes] == [0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5]


def test_png_is_a_picture_and_the_same_every_time():
    def draw():
        return plots.png(plots.plot_bars({"a": 1}, "n"))

    assert draw() == draw()
    assert draw()[:4] == b"\x89PNG"


def test_the_page_colors_can_be_told_apart_in_gray():
    levels = [Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0)) for color in plots.PALE]
    assert min(levels) > 200  # dark text is readable on each
