"""Pictures of results, from the JSON alone and the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COPY, WORK = "copy", "a step's work"
# microseconds around the end of a step that the lower part of a timeline shows
ZOOM_US = (-30, 120)
# ours first; readable on a light and on a dark page
_OURS = "#1f77d0"
_OTHERS = ("#c26a12", "#8c6bb1", "#7a8793", "#b5485d", "#4d9221")
_INK = "#7d8590"
_STYLE = {
    "svg.hashsalt": "fd_dsa",
    # text stays text: small files, and no outlines that depend on a font's version
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def digest(result: Mapping[str, Any]) -> str:
    """What a plot shows, as a hash; the plot holds it, so that a stale one is found."""
    shown = result["groups"] if "groups" in result else [result["timeline"]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def picture(result: Mapping[str, Any]) -> str:
    """The SVG of a flagship's groups, or of a result's timeline."""
    return relative(result) if "groups" in result else timeline(result)


def relative(shown: Mapping[str, Any]) -> str:
    """An SVG: a group of bars a case, the time of each side relative to ours.

    Args:
        shown: "groups", each with "case", "relative" (side -> time by ours, ours first) and "text"
            (side -> label of the bar).
    """
    groups = shown["groups"]
    sides = list(dict.fromkeys(side for group in groups for side in group["relative"]))
    colours = dict(zip(sides, (_OURS, *_OTHERS), strict=False))
    rows = sum(len(group["relative"]) + 1 for group in groups)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.2 * rows))
        axes = figure.subplots()
        height, middles = 0, []
        for group in groups:
            first = height
            for side, value in group["relative"].items():
                axes.barh(height, value, height=0.8, color=colours[side], label=side)
                axes.text(value, height, f" {group['text'][side]}", va="center", fontsize=8)
                height += 1
            middles.append((first + height - 1) / 2)
            height += 1
        axes.axvline(1, linestyle=":", color=_INK, zorder=0)
        axes.set_yticks(middles, [group["case"] for group in groups])
        axes.invert_yaxis()
        axes.set_xlabel("time relative to fd_dsa; a shorter bar is faster")
        _legend(axes, -0.5 / (0.2 * rows), 4)
        return _svg(figure, shown)


def _legend(axes: Any, y: float, columns: int) -> None:
    """The names of the colours, each once, below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    legend = axes.legend(
        by_label.values(), by_label, loc="upper center", bbox_to_anchor=(0.5, y), ncols=columns
    )
    for text in legend.get_texts():
        text.set_color(_INK)
    legend.get_frame().set_alpha(0)


def _svg(figure: Figure, result: Mapping[str, Any]) -> str:
    """A figure as text, with the hash of what it shows."""
    buffer = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Description": digest(result)}
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=metadata)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def timeline(result: Mapping[str, Any]) -> str:
    """An SVG: when everything on the device ran, a lane a stream; all of it, and a part closer."""
    sides = result["timeline"]
    lanes = [
        (f"{label}, {'second' if stream else 'main'}", [k for k in run if k["stream"] == stream])
        for label, run in sides.items()
        for stream in sorted({kernel["stream"] for kernel in run})
    ]
    names = list(dict.fromkeys(kernel["name"] for run in sides.values() for kernel in run))
    others = [name for name in names if name != COPY]
    colours = dict(zip(others, _OTHERS * 9, strict=False)) | {COPY: _OURS}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1.2 + 0.7 * len(lanes)))
        for axes, limits in zip(figure.subplots(2, 1), _limits(result), strict=True):
            _draw_lanes(axes, lanes, colours)
            axes.set_xlim(*limits)
        axes.set_xlabel("microseconds")
        _legend(axes, -0.6, 4)
        figure.subplots_adjust(hspace=0.5)
        return _svg(figure, result)


def _limits(result: Mapping[str, Any]) -> tuple[tuple[float | None, float | None], ...]:
    """From where to where both halves of a timeline run; the second is a closer look."""
    events = next(iter(result["timeline"].values()))
    end = next(e["start_us"] + e["us"] for e in events if e["name"] == WORK)
    return (0, None), tuple(end + from_end for from_end in ZOOM_US)


def _draw_lanes(
    axes: Any, lanes: list[tuple[str, list[dict[str, Any]]]], colours: Mapping[str, str]
) -> None:
    """One bar a kernel."""
    for height, (_, kernels) in enumerate(lanes):
        for kernel in kernels:
            name = kernel["name"]
            axes.barh(
                height,
                kernel["us"],
                left=kernel["start_us"],
                height=0.7,
                color=colours[name],
                # a copy of microseconds between steps of hundreds would be thinner than a line
                edgecolor=colours[name],
                linewidth=0.5,
                label=name,
            )
    axes.set_yticks(range(len(lanes)), [label for label, _ in lanes])
    axes.invert_yaxis()
