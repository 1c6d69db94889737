"""Plot lines between models, traces of facts, and courses of trainings, by matplotlib, which drawing alone imports."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lfm.errors import PlanError
from mergekit_lfm.store.durable import replace_file
from mergekit_lfm.store.places import check_file

if TYPE_CHECKING:
    from mergekit_lfm.judge.barrier import Interpolation

# Okabe and Ito's colours, distinct for any colour vision; the shapes of the marks are distinct in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX"
LEGEND = 105  # characters, marks included, that fit above the axes
INCHES, DOTS_PER_INCH = (9.0, 3.8), 150
HEAT_INCHES = (2.4, 2.5, 0.12, 2.4)  # widths: names and bar, smallest panel, one layer; height
SHADES = {"hidden": "whole layer", "mlp": "MLP", "attention": "attention"}  # titles of the panels


def check_plot(path: str | Path) -> None:
    """Raise PlanError, before the work, if no plot can be drawn to this path."""
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise PlanError(f"the plot {file} is written as a PNG; give it a name that ends with .png")
    check_file(file, [], overwrite=True)
    _matplotlib()


def plot_lines(
    lines: Mapping[str, Interpolation], path: str | Path, *, ends: Sequence[str] = ("A", "B"), loss: str = "loss (nats)"
) -> None:
    """Draw the losses and the accuracies of lines against t, each with its name, into one PNG.

    ends: names of the models at t = 0 and 1. A dotted line joins the ends. Raises PlanError if matplotlib is not
    installed or the path cannot be written.
    """
    check_plot(path)
    if not lines:
        raise PlanError("found no lines to draw; give some by name, {'naive': line}")
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=INCHES, layout="constrained")
    canvas_class(figure)
    left, right = figure.subplots(1, 2)
    for axes, quantity, label in ((left, "loss", loss), (right, "accuracy", "accuracy")):
        for i, (name, line) in enumerate(lines.items()):
            _draw(axes, line, quantity, name, COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)])
        axes.set_xlabel("t")
        axes.set_ylabel(label)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [f"0\n{ends[0]}", "0.25", "0.5", "0.75", f"1\n{ends[1]}"])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        handles = left.get_legend_handles_labels()
        columns = max(1, min(len(lines), LEGEND // (max(map(len, lines)) + 6)))
        figure.legend(*handles, loc="outside upper center", ncols=columns, frameon=False)
    _save(figure, path)


def plot_effects(
    effects: Mapping[str, Mapping[str, Sequence[float | None]]], path: str | Path, *, title: str = ""
) -> None:
    """Draw indirect effects as heat maps, one panel for each kind of state, with one scale of colours for all, as PNG.

    effects: by kind, then by the role of the token, a number for each layer; None and NaN are grey. Raises PlanError if
    matplotlib is not installed or the path cannot be written.
    """
    check_plot(path)
    figure_class, canvas_class = _matplotlib()
    values = {
        kind: [[math.nan if x is None else float(x) for x in row] for row in rows.values()]
        for kind, rows in effects.items()
    }
    layers = max(len(row) for rows in values.values() for row in rows)
    names, least, cell, height = HEAT_INCHES
    size = (names + len(values) * max(least, layers * cell), height + 0.3 * bool(title))
    figure = figure_class(figsize=size, layout="constrained")
    canvas_class(figure)
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    most = max((x for rows in values.values() for row in rows for x in row if math.isfinite(x)), default=0.0)
    for axes, (kind, rows) in zip(panels, values.items(), strict=True):
        axes.set_facecolor("0.85")
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=max(most, 1e-9), aspect="auto", interpolation="nearest")
        axes.set_title(SHADES.get(kind, kind), fontsize=10)
        axes.set_xlabel("layer put back")
        step = max(1, -(-layers // 12))
        axes.set_xticks(range(0, layers, step))
        axes.set_yticks(range(len(rows)), list(effects[kind]))
    figure.colorbar(image, ax=list(panels), label="mean indirect effect", pad=0.01, fraction=0.03)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_courses(courses: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draw the losses and the learning rates of trainings over their steps, each by its name, into one PNG.

    courses: a line of the record for each step. A thick line is the mean of the last twentieth of the steps, marks are
    losses on the development set. Raises PlanError if matplotlib is not installed or the path cannot be written.
    """
    check_plot(path)
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=INCHES, layout="constrained")
    canvas_class(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for i, (name, lines) in enumerate(courses.items()):
        colour, steps = COLOURS[i % len(COLOURS)], [line["step"] for line in lines]
        losses = [line["loss"] for line in lines]
        left.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.3)
        left.plot(steps, _smoothed(losses, max(1, len(losses) // 20)), color=colour, linewidth=1.8, label=name)
        looks = [(line["step"], line["dev_loss"]) for line in lines if "dev_loss" in line]
        if looks:
            marks = {"marker": MARKS[i % len(MARKS)], "markersize": 5, "linestyle": ":", "linewidth": 1}
            left.plot(*zip(*looks, strict=True), color=colour, label=f"{name}, development set", **marks)
        right.plot(steps, [line["learning_rate"] for line in lines], color=colour, linewidth=1.6)
    for axes, label in ((left, "loss"), (right, "learning rate")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    left.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _smoothed(values: Sequence[float], size: int) -> list[float]:
    """The mean of each value and those before it, up to `size` of them."""
    windows = [values[max(0, i + 1 - size) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _save(figure: Any, path: str | Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    replace_file(Path(path), image.getvalue())


def _draw(axes: Any, line: Interpolation, quantity: str, name: str, colour: str, mark: str) -> None:
    times = [point.t for point in line.points]
    values = [getattr(point, quantity) for point in line.points]
    values = [value if math.isfinite(value) else math.nan for value in values]
    axes.plot(times, values, color=colour, marker=mark, markersize=4, linewidth=1.6, label=name)
    axes.plot([0, 1], [values[0], values[-1]], color=colour, linestyle=":", linewidth=1)
    axes.scatter([0, 1], [values[0], values[-1]], color=colour, marker=mark, s=55, zorder=3)


def _matplotlib() -> tuple[Any, Any]:
    """The classes of a figure and of the canvas that draws it without a screen."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PlanError('a plot needs matplotlib: pip install "mergekit_lfm[plots]"') from None
    return Figure, FigureCanvasAgg
