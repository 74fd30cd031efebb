"""The pictures of the course: each function returns a matplotlib Figure, and `show` displays it.

The colors are those of Okabe and Ito, which color-blind readers can tell apart, on a white ground
that is readable on a dark page too.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
COLORS = [BLUE, ORANGE, GREEN, RED, PURPLE, "#56B4E9", "#666666"]
LINES = ["-", "--", "-.", ":"]  # so that color is never the only difference
PALE = ["#DCEBF5", "#FBEBCB", "#D5EEE6", "#F5E3EC", "#F8DDCF"]
INK, GRAY = "#1f2328", "#57606a"


def show(figure: Figure, alt: str) -> None:
    """Put a figure on the page with `alt`, its content in words, for those who cannot see it."""
    data = {"image/png": base64.b64encode(png(figure)).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def new_axes(width: float = 7.5, height: float = 3.6, title: str = "") -> tuple[Figure, Axes]:
    """Return an empty figure in the style of the course, and its axes."""
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    return figure, axes


def plot_lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x: str,
    y: str,
    title: str = "",
    x_log: bool = False,
    y_log: bool = False,
) -> Figure:
    """Draw curves, each named and given as (xs, ys); ys may also be several runs (runs, points).

    Of several runs the line is the mean, in a band from the lowest to the highest.
    """
    figure, axes = new_axes(title=title)
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)]}
        runs = np.atleast_2d(ys)
        axes.plot(xs, runs.mean(axis=0), label=name, linewidth=2, **style)
        if len(runs) > 1:
            axes.fill_between(
                xs, runs.min(axis=0), runs.max(axis=0), color=style["color"], alpha=0.2
            )
    axes.set(xlabel=x, ylabel=y)
    axes.set_xscale("log" if x_log else "linear")
    axes.set_yscale("log" if y_log else "linear")
    points = sorted({x for xs, _ in curves.values() for x in xs})
    if x_log and len(points) <= 10:  # a label at each point says more than one at each power of ten
        axes.set_xticks(points, [f"{x:,}" for x in points])
        axes.set_xticks([], minor=True)
    for axis, log in ((axes.xaxis, x_log), (axes.yaxis, y_log)):
        if not log and max(map(abs, axis.get_view_interval())) >= 10_000:
            axis.set_major_formatter("{x:,.0f}")
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def plot_bars(values: Mapping[str, float], x: str, title: str = "", decimals: int = 1) -> Figure:
    """Draw one horizontal bar for each named value, the first on top, with its number."""
    figure, axes = new_axes(height=0.8 + 0.42 * len(values), title=title)
    bars = axes.barh(list(values), list(values.values()), color=BLUE, height=0.6)
    axes.bar_label(bars, fmt=f"{{:,.{decimals}f}}", padding=4, color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(x)
    return figure


def plot_stacked(
    rows: Mapping[str, Mapping[str, float]], x: str, title: str = "", decimals: int = 1
) -> Figure:
    """Draw one horizontal bar for each named row, made of named parts, with the row's sum."""
    figure, axes = new_axes(height=1.3 + 0.42 * len(rows), title=title)
    names, left = list(rows), [0.0] * len(rows)
    for i, part in enumerate(dict.fromkeys(part for row in rows.values() for part in row)):
        values = [row.get(part, 0.0) for row in rows.values()]
        style = {"color": COLORS[i % len(COLORS)], "hatch": ["", "//", "..", "xx"][i % 4]}
        bars = axes.barh(names, values, left=left, label=part, height=0.6, ec="white", **style)
        left = [a + b for a, b in zip(left, values, strict=True)]
    labels = [f"{total:,.{decimals}f}" for total in left]
    axes.bar_label(bars, labels=labels, padding=4, color=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel(x)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


def plot_heatmap(matrix, x: str, y: str, title: str = "", label: str = "") -> Figure:
    """Draw a matrix as colors, with zero in the middle of the scale."""
    figure, axes = new_axes(title=title)
    limit = float(abs(matrix).max())
    image = axes.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axes.grid(visible=False)
    axes.set(xlabel=x, ylabel=y)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def plot_weights(weights, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Figure:
    """Draw a matrix of weights from 0 (white) to 1 (blue), with named rows and columns.

    Each weight is written into its cell while there is room; True and False show as 1 and 0.
    """
    values = [[float(w) for w in row] for row in weights]
    size = 0.42 if len(rows) > 7 else 0.55
    shape = {"width": 2 + 1.15 * size * len(columns), "height": 1.1 + size * len(rows)}
    figure, axes = new_axes(title=title, **shape)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="looks at", ylabel="the token that looks")
    if len(rows) <= 14:
        for y, row in enumerate(values):
            for x, w in enumerate(row):
                shown = f"{w:.2f}".lstrip("0") if 0.005 <= w < 0.995 else f"{w:.0f}"
                color = "white" if w > 0.55 else INK
                axes.text(x, y, shown, ha="center", va="center", fontsize=8.5, color=color)
    return figure


def plot_points(points, names: Sequence[str], groups: Sequence[str], title: str = "") -> Figure:
    """Draw named points (n, 2), colored and marked by group."""
    figure, axes = new_axes(height=4.8, title=title)
    for i, group in enumerate(dict.fromkeys(groups)):
        rows = [r for r, g in enumerate(groups) if g == group]
        xs, ys = [float(points[r][0]) for r in rows], [float(points[r][1]) for r in rows]
        marker = "osD^vPX"[i % 7]
        axes.scatter(xs, ys, color=COLORS[i % len(COLORS)], marker=marker, label=group, s=40)
        for r, px, py in zip(rows, xs, ys, strict=True):
            axes.annotate(names[r], (px, py), (5, 4), textcoords="offset points", fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=9)
    return figure


def plot_tokens(
    tokens: Sequence[str], title: str = "", width: int = 76, marked: Sequence[bool] | None = None
) -> Figure:
    """Draw each token in a box of its own, in lines of `width` characters; spaces show as ␣.

    If some tokens are to be marked, these are orange and bold, and all others white.
    """
    lines, used = [[]], 0
    for number, token in enumerate(tokens):
        shown = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
        if used + len(shown) + 0.6 > width and lines[-1]:
            lines.append([])
            used = 0
        lines[-1].append((used, shown, marked is not None and marked[number]))
        used += len(shown) + 0.6
    figure, axes = new_axes(width=9, height=0.55 + 0.36 * len(lines), title=title)
    axes.set(xlim=(0, width), ylim=(len(lines) - 0.4, -0.6))
    axes.axis("off")
    for y, line in enumerate(lines):
        for i, (x, shown, strong) in enumerate(line):
            box = (x + 0.1, y - 0.36), len(shown) + 0.4, 0.72
            color = PALE[(i + 2 * y) % len(PALE)] if marked is None else "white"
            color, weight = (PALE[1], "bold") if strong else (color, "normal")
            axes.add_patch(FancyBboxPatch(*box, boxstyle="square,pad=0", fc=color, ec="#9aa4ae"))
            center = x + 0.3 + len(shown) / 2
            font = {"family": "monospace", "weight": weight, "fontsize": 11}
            axes.text(center, y, shown, ha="center", va="center", **font)
    return figure


def plot_windows(tokens: Sequence[str], context_length: int, stride: int) -> Figure:
    """Draw a row of tokens and, under it, every sliding window: inputs blue, targets orange."""
    starts = range(0, len(tokens) - context_length, stride)
    figure, axes = new_axes(width=9, height=1.0 + 0.62 * len(starts))
    axes.set(xlim=(-1.9, len(tokens)), ylim=(len(starts) + 0.1, -0.8))
    axes.axis("off")
    font = {"family": "monospace", "ha": "center", "va": "center"}
    for x, token in enumerate(tokens):
        axes.text(x + 0.5, -0.45, token.replace(" ", "␣"), fontsize=11, weight="bold", **font)
    for y, start in enumerate(starts):
        axes.text(-0.15, y + 0.42, f"window {y}", ha="right", va="center", color=GRAY)
        for shift, row, color, edge in ((0, 0.22, PALE[0], BLUE), (1, 0.62, PALE[1], RED)):
            for x in range(start + shift, start + shift + context_length):
                box = (x + 0.04, y + row - 0.17), 0.92, 0.34
                axes.add_patch(FancyBboxPatch(*box, boxstyle="square,pad=0", fc=color, ec=edge))
                axes.text(x + 0.5, y + row, tokens[x].replace(" ", "␣"), fontsize=9, **font)
    axes.text(
        0, len(starts) - 0.02, "blue, upper row: input     orange, lower row: target", color=GRAY
    )
    return figure


def plot_panels(
    panels: Mapping[str, Sequence[float] | Mapping[str, Sequence[float]]], x: str
) -> Figure:
    """Draw named numbers, or several rows of them with a name each, in panels above one another.

    All share the x axis, which counts from 1. The first panel has the legend.
    """
    figure = Figure(figsize=(7.5, 1.35 * len(panels) + 0.5), dpi=110, facecolor="white")
    figure.set_layout_engine("constrained")
    for axes, (name, rows) in zip(
        figure.subplots(len(panels), sharex=True), panels.items(), strict=True
    ):
        rows = rows if isinstance(rows, Mapping) else {"": rows}
        for i, (label, ys) in enumerate(rows.items()):
            style = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)]}
            axes.plot(range(1, len(ys) + 1), ys, label=label, linewidth=2, **style)
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        if len(rows) > 1 and axes is figure.axes[0]:
            axes.legend(frameon=False, ncols=len(rows))
    axes.set_xlabel(x)
    return figure
