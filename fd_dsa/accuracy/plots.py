"""Pictures as SVG text: the same bytes for the same figures, readable on light and dark pages.

    heat_map(passed, total, rows=, columns=, title=, row_label=, column_label=)
    bars({title: {group: {series: Estimate}}}, value_label=)
    layer_lines({series: [Estimate or float per layer]}, title=, value_label=)
    layer_map(shares [layers, bins], tokens=, marks={label: (start, end)}, title=)
    token_map(shares [layers, tokens], tokens=[text of each], title=)
    before_after({metric: (before, after, difference)}, names=(before, after))

Each returns the whole file; `report.write_files` writes it. Shares are fractions, shown in percent.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd_dsa.accuracy.stats import Estimate, wilson
from fd_dsa.errors import BackendUnavailable, ShapeError

# a blue, an orange and others that hold on white and on black
_COLOURS = ("#1f77d0", "#c26a12", "#8c6bb1", "#4d9221", "#b5485d", "#7a8793")
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
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.framealpha": 0,
    "legend.labelcolor": _INK,
}
# from nothing to everything passed; both ends differ in lightness too, not in hue alone
_COLD, _WARM = np.array([0.78, 0.25, 0.20]), np.array([0.16, 0.56, 0.36])
_MIDDLE = np.array([0.93, 0.83, 0.55])


def require() -> None:
    """Raise BackendUnavailable, one line, where there is no matplotlib; call it before a run."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"matplotlib, which draws the report's pictures, cannot be imported ({error}); "
            "pip install 'fd_dsa[accuracy]'"
        ) from error


def heat_map(
    passed: ArrayLike,
    total: ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
) -> str:
    """A grid of cells: colour = share, text = count and the bounds of its Wilson interval.

    Args:
        passed: int [rows, columns].
        total: int [rows, columns]; 0 leaves the cell empty.
        rows: a label for each row, from top to bottom: depth, ...
        columns: a label for each column: length, ...
    """
    good, trials = np.asarray(passed), np.asarray(total)
    wanted = (len(rows), len(columns))
    if good.shape != wanted or trials.shape != wanted:
        raise ShapeError(
            f"heat_map: passed {good.shape}, total {trials.shape}; both must be {wanted}"
        )
    with _figure((1.9 + 0.95 * len(columns), 1.2 + 0.42 * len(rows))) as (figure, finish):
        axes = figure.subplots()
        for (row, column), tried in np.ndenumerate(trials):
            if tried:
                _cell(axes, row, column, int(good[row, column]), int(tried))
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        told = f"{column_label}\nin each cell: passed / tried, and the 95 % interval in %"
        axes.set(title=title, xlabel=told, ylabel=row_label)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return finish()


def bars(
    panels: Mapping[str, Mapping[str, Mapping[str, Estimate]]], *, value_label: str = "%"
) -> str:
    """Horizontal bars with their intervals: panel title -> group -> series -> estimate.

    A series has one colour in all panels; NaN leaves its bar out.
    """
    series = list(
        dict.fromkeys(s for groups in panels.values() for g in groups.values() for s in g)
    )
    colours = _colours(series)
    heights = [sum(len(group) + 1 for group in groups.values()) for groups in panels.values()]
    with _figure((7.5, 0.6 * len(panels) + 0.14 * sum(heights))) as (figure, finish):
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, (title, groups) in zip(grid[:, 0], panels.items(), strict=True):
            _bar_groups(axes, groups, colours)
            axes.set_title(title)
        last = grid[-1, 0]
        last.set_xlabel(f"{value_label}, with 95 % intervals")
        if len(series) > 1:
            handles = [_swatch(colours[name]) for name in series]
            figure.legend(handles, series, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
        figure.tight_layout()
        return finish()


def layer_lines(
    series: Mapping[str, Sequence[Estimate | float]], *, title: str, value_label: str
) -> str:
    """A line for each series over the layers, 0 first; an Estimate brings its interval.

    Args:
        series: label -> one value of 0 to 1 a layer; NaN leaves a gap.
    """
    colours = _colours(list(series))
    with _figure((7.5, 3.2)) as (figure, finish):
        axes = figure.subplots()
        for label, values in series.items():
            known = [v if isinstance(v, Estimate) else Estimate(v, v, v) for v in values]
            percent = 100 * np.array(known, dtype=np.float64).reshape(-1, 3)
            layers = np.arange(len(percent))
            axes.plot(layers, percent[:, 0], marker="o", color=colours[label], label=label)
            axes.vlines(layers, percent[:, 1], percent[:, 2], color=colours[label], alpha=0.6)
        most = max((len(values) for values in series.values()), default=1)
        axes.set_xticks(range(0, most, max(1, most // 16)))
        axes.set_ylim(-3, 103)
        axes.set(title=title, xlabel="layer", ylabel=f"{value_label}, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
        return finish()


def layer_map(
    shares: ArrayLike,
    *,
    tokens: int,
    title: str,
    marks: Mapping[str, tuple[int, int]] | None = None,
    layers: Sequence[str] | None = None,
) -> str:
    """What each layer chose of a sequence: a row a layer, colour = chosen share of each stretch.

    Args:
        shares: float [layers, bins] of 0 to 1; the bins divide the sequence evenly.
        tokens: its length.
        marks: label -> half-open range of tokens to point at, such as a needle.
        layers: a label for each row; 0, 1, ... without.
    """
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 2:
        raise ShapeError(f"layer_map: shares have shape {values.shape}; wanted [layers, bins]")
    count = len(values)
    labels = list(map(str, range(count))) if layers is None else list(layers)
    with _figure((7.5, 1.3 + 0.24 * count)) as (figure, finish):
        axes = figure.subplots()
        extent = (0, tokens, count - 0.5, -0.5)
        options = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "none"}
        image = axes.imshow(values, aspect="auto", extent=extent, **options)
        for label, (start, end) in (marks or {}).items():
            # above the map, so that it hides nothing; wide enough to be seen
            ends = [start, max(end, start + tokens / 200)]
            axes.plot(ends, [-0.7] * 2, color=_COLOURS[1], linewidth=4, clip_on=False)
            axes.annotate(
                label,
                ((start + end) / 2, -0.7),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                annotation_clip=False,
            )
        axes.set(xlim=(0, tokens), ylim=(count - 0.5, -0.5))
        axes.set_yticks(range(0, count, max(1, count // 24)), labels[:: max(1, count // 24)])
        axes.set(xlabel="position, tokens", ylabel="layer")
        axes.set_title(title, pad=22 if marks else 6)
        bar = figure.colorbar(image, ax=axes, label="chosen, %")
        bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
        return finish()


def token_map(
    shares: ArrayLike, *, tokens: Sequence[str], title: str, layers: Sequence[str] | None = None
) -> str:
    """A cell for each layer and token of a short stretch: colour = how often it was chosen.

    Args:
        shares: float [layers, tokens] of 0 to 1.
        tokens: their texts.
        layers: a label for each row; 0, 1, ... without.
    """
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(tokens):
        raise ShapeError(
            f"token_map: shares have shape {values.shape}; wanted [layers, {len(tokens)}]"
        )
    count = len(values)
    labels = list(map(str, range(count))) if layers is None else list(layers)
    with _figure((1.5 + 0.2 * len(tokens), 1.0 + 0.24 * count)) as (figure, finish):
        axes = figure.subplots()
        options = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "none"}
        image = axes.imshow(values, aspect="auto", **options)
        # a dollar sign would begin a formula
        texts = [token.replace("$", r"\$") for token in tokens]
        axes.set_xticks(range(len(tokens)), texts, rotation=90)
        axes.set_yticks(range(0, count, max(1, count // 24)), labels[:: max(1, count // 24)])
        axes.set(title=title, ylabel="layer")
        bar = figure.colorbar(image, ax=axes, label="chosen, %")
        bar.set_ticks([0, 0.5, 1], labels=["0", "50", "100"])
        return finish()


def before_after(
    metrics: Mapping[str, tuple[Estimate, Estimate, Estimate]], *, names: tuple[str, str]
) -> str:
    """Two runs side by side: bars of each metric, and beside them the difference in points.

    Args:
        metrics: name -> before, after, after - before.
        names: of the two runs.
    """
    plain = names == ("before", "after")
    labels = names if plain else (f"before: {names[0]}", f"after: {names[1]}")
    colours = _colours(list(labels))
    with _figure((9, 1.0 + 0.55 * len(metrics))) as (figure, finish):
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        groups = {m: dict(zip(labels, sides[:2], strict=True)) for m, sides in metrics.items()}
        _bar_groups(left, groups, colours)
        left.set_xlabel("%, with 95 % intervals")
        left.set_ylim(3 * len(metrics) - 1, -1)
        for row, (_, _, change) in enumerate(metrics.values()):
            height = 3 * row + 0.5
            right.plot([100 * change.low, 100 * change.high], [height] * 2, color=_INK)
            right.plot(100 * change.value, height, marker="o", color=colours[labels[1]])
        right.axvline(0, color=_INK, linestyle=":", linewidth=1)
        right.set_yticks([])
        right.set_ylim(3 * len(metrics) - 1, -1)
        right.set_xlabel("after - before, points, with 95 % intervals")
        handles = [_swatch(colours[label]) for label in labels]
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
        figure.tight_layout()
        return finish()


@contextmanager
def _figure(inches: tuple[float, float]) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure in our style, and the function that makes its SVG text."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = _STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches)
        yield figure, lambda: _svg(figure)


def _svg(figure: Any) -> str:
    """The SVG of a figure, without a date and without spaces at the ends of lines."""
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata=metadata)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _colours(series: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order, again from the first when they run out."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(series)}


def _swatch(colour: str) -> Any:
    """What a legend shows of a colour."""
    from matplotlib.patches import Patch

    return Patch(color=colour, alpha=0.7)


def _shade(share: float) -> NDArray[np.float64]:
    """Colour of a share: red, sand, green."""
    if share < 0.5:
        return _COLD + (_MIDDLE - _COLD) * 2 * share
    return _MIDDLE + (_WARM - _MIDDLE) * (2 * share - 1)


def _cell(axes: Any, row: int, column: int, passed: int, tried: int) -> None:
    """One coloured cell of a heat map with its text."""
    from matplotlib.patches import Rectangle

    result = wilson(passed, tried)
    shade = _shade(result.value)
    corner = (column - 0.48, row - 0.47)
    axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=shade, linewidth=0))
    text = f"{passed}/{tried}\n{100 * result.low:.0f} to {100 * result.high:.0f}"
    light = shade @ np.array([0.299, 0.587, 0.114]) < 0.55
    colour = "#ffffff" if light else "#1b1f24"
    axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def _bar_groups(
    axes: Any, groups: Mapping[str, Mapping[str, Estimate]], colours: Mapping[str, str]
) -> None:
    """Groups of bars from top to bottom, thin lines for the intervals, in percent."""
    height, middles = 0.0, []
    for group in groups.values():
        first = height
        for name, estimate in group.items():
            value, low, high = (100 * part for part in estimate)
            if not math.isnan(value):
                axes.barh(height, value, height=0.85, color=colours[name], alpha=0.5)
                axes.plot([low, high], [height] * 2, color=colours[name], linewidth=1.5)
                axes.text(high + 1, height, f"{value:.1f}", va="center", fontsize=7)
            height += 1
        middles.append((first + height - 1) / 2)
        height += 1
    axes.set_yticks(middles, list(groups))
    axes.set_ylim(height - 1, -1)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
