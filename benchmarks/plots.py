"""Pictures of results, from the JSON alone and the same bytes every time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# ours first; readable on a light and on a dark page
_COLOURS = ("#1f77d0", "#c26a12", "#8c6bb1", "#7a8793", "#b5485d", "#4d9221")
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


def digest(shown: Mapping[str, Any]) -> str:
    """Return a hash of a plot's figures. The plot holds it, so that a stale plot is found."""
    return hashlib.sha256(json.dumps(shown["groups"]).encode()).hexdigest()[:16]


def picture(shown: Mapping[str, Any]) -> str:
    """Return an SVG: a group of bars a case, the time of each side relative to ours.

    Args:
        shown: "groups", each with "case", "relative" (side -> time by ours, ours first) and "text"
            (side -> label of the bar).
    """
    groups = shown["groups"]
    sides = list(dict.fromkeys(side for group in groups for side in group["relative"]))
    colours = dict(zip(sides, _COLOURS, strict=False))
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
        # the names of the colours, each once, below the axes
        handles, labels = axes.get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.5 / (0.2 * rows)), "ncols": 4}
        legend = axes.legend(by_label.values(), by_label, **place)
        for text in legend.get_texts():
            text.set_color(_INK)
        legend.get_frame().set_alpha(0)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": digest(shown)}
        how = {"bbox_inches": "tight", "transparent": True}
        figure.savefig(buffer, format="svg", metadata=metadata, **how)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
