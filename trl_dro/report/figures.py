# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The figures of `trl-dro report`, as PNG. Colours are those of Okabe and Ito, told apart by the colour-blind; lines
differ in their markers too, and bars in their hatching, for paper without colour."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise ImportError("the report needs matplotlib: pip install 'trl_dro[plots]'") from None


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
GREY = "#8A8A8A"
_MARKERS = "osD^v"
_DASHES = ("-", "--", "-.", ":", "-")
_HATCHES = ("", "////", "....", "xxxx", "----")
# Legible at the width of a phone, where an inch is some 75 pixels.
_SIZE = (4.6, 3.1)  # inches
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": "white",
    "hatch.linewidth": 0.8,
}
# Of (x, y), one line or one group of bars.
Points = Sequence[tuple[float, float]]


def curves(lines: Mapping[str, Points], ylabel: str, limit: tuple[float, str] | None = None) -> bytes:
    """
    Lines over updates, with markers where they are few.

    Args:
        lines (`dict[str, list[tuple[float, float]]]`):
            Update and value of each point, by the name of the line.
        ylabel (`str`):
            What is drawn, with its unit.
        limit (`tuple[float, str]`, *optional*):
            Height and name of a line across.

    Returns:
        `bytes`: PNG.
    """
    with rc_context(_STYLE):
        figure, axes = _figure()
        for number, (name, points) in enumerate(lines.items()):
            marker = _MARKERS[number] if len(points) <= 40 else None
            style, colour = _DASHES[number], COLOURS[number]
            axes.plot(*zip(*points, strict=True), style, label=name, color=colour, marker=marker, markersize=4.5)
        if limit is not None:
            axes.axhline(limit[0], label=limit[1], color=GREY, linestyle="--", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="updates", ylabel=ylabel)
        if len(lines) > 1 or limit is not None:
            _legend_above(axes)
        return _png(figure)


def bars(groups: Mapping[str, Mapping[str, float]], ylabel: str) -> bytes:
    """
    Bars of shares side by side, with their values above.

    Args:
        groups (`dict[str, dict[str, float]]`):
            Percentages by place on the axis, by the name of the bars' colour. The first is drawn in grey.
        ylabel (`str`):
            What is drawn, with its unit.

    Returns:
        `bytes`: PNG.
    """
    with rc_context(_STYLE):
        figure, axes = _figure()
        places = list(next(iter(groups.values())))
        width = 0.8 / len(groups)
        for number, (name, values) in enumerate(groups.items()):
            centres = [place + width * (number - (len(groups) - 1) / 2) for place in range(len(places))]
            colour = GREY if number == 0 else COLOURS[number - 1]
            drawn = axes.bar(
                centres, list(values.values()), 0.92 * width, label=name, color=colour, hatch=_HATCHES[number]
            )
            axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
        highest = max(value for values in groups.values() for value in values.values())
        axes.set(xticks=range(len(places)), xticklabels=places, ylabel=ylabel, ylim=(0, max(5.0, 1.12 * highest)))
        _legend_above(axes)
        return _png(figure)


def histogram(samples: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, limit: tuple[float, str]) -> bytes:
    """
    Distributions of values from 0 to 1, in twenty bins.

    Args:
        samples (`dict[str, list[float]]`):
            Values, by the name of the distribution.
        xlabel (`str`):
            What is counted.
        ylabel (`str`):
            Of what the share is.
        limit (`tuple[float, str]`):
            Place and name of an upright line.

    Returns:
        `bytes`: PNG.
    """
    with rc_context(_STYLE):
        figure, axes = _figure()
        axes.hist(
            list(samples.values()),
            bins=[i / 20 for i in range(21)],
            weights=[[100 / len(values)] * len(values) for values in samples.values()],
            label=list(samples),
            color=COLOURS[: len(samples)],
            hatch=_HATCHES[: len(samples)],
        )
        axes.axvline(limit[0], label=limit[1], color="black", linestyle="--", linewidth=1)
        axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1))
        _legend_above(axes)
        return _png(figure)


def stacked_shares(shares: Mapping[str, Mapping[str, float]], xlabel: str) -> bytes:
    """
    A bar of 100% per row.

    Args:
        shares (`dict[str, dict[str, float]]`):
            Percentages by part, by the name of the row.
        xlabel (`str`):
            Of what the shares are.

    Returns:
        `bytes`: PNG.
    """
    with rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure, axes = _figure(height=1.5 + 0.55 * len(shares))
        parts = list(next(iter(shares.values())))
        starts = [0.0] * len(shares)
        colours = (COLOURS[2], COLOURS[4], COLOURS[3], GREY)
        for part, colour, hatch in zip(parts, colours, _HATCHES, strict=False):
            values = [row[part] for row in shares.values()]
            drawn = axes.barh(list(shares), values, 0.6, starts, label=part, color=colour, hatch=hatch)
            numbers = [f"{value:.0f}" if value >= 6 else "" for value in values]
            plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
            axes.bar_label(drawn, numbers, label_type="center", fontsize=8, bbox=plate)
            starts = [start + value for start, value in zip(starts, values, strict=True)]
        # A path of any length must leave room for the bars.
        names = [name if len(name) <= 18 else f"…{name[-17:]}" for name in shares]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel=xlabel, xlim=(0, 100))
        _legend_above(axes)
        return _png(figure)


def _figure(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.subplots()


def _legend_above(axes: Axes) -> None:
    """Where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.2)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
