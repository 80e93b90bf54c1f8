"""Pictures hold what they are given, as text, and are the same bytes every time."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
import pytest

from fd_dsa.accuracy import plots
from fd_dsa.accuracy.stats import Estimate, two_proportions, wilson
from fd_dsa.errors import BackendUnavailable, ShapeError

PASSED = np.array([[20, 5], [0, 11]])
SHARE = wilson(469, 541)


def heat_map() -> str:
    total = np.array([[20, 20], [20, 0]])
    return plots.heat_map(
        PASSED * (total > 0),
        total,
        rows=["0 %", "100 %"],
        columns=["512", "8192"],
        title="passkey",
        row_label="depth",
        column_label="length, tokens",
    )


def bars() -> str:
    missing = Estimate(float("nan"), 0, 1)
    types = {"a:0": {"strict": SHARE, "loose": missing}}
    return plots.bars({"All": {"prompts": {"strict": SHARE}}, "By type": types})


def layer_lines() -> str:
    series = {"float32": [0.5, float("nan"), 1.0], "fp8": [wilson(15, 20)] * 3}
    return plots.layer_lines(series, title="needle recall", value_label="recall")


def layer_map() -> str:
    shares = np.linspace(0, 1, 12).reshape(3, 4)
    return plots.layer_map(shares, tokens=3000, title="chosen", marks={"needle": (1000, 1020)})


def before_after() -> str:
    change = two_proportions((469, 541), (475, 541))
    return plots.before_after({"Metric": (SHARE, wilson(475, 541), change)}, names=("old", "new"))


@pytest.mark.parametrize(
    ("picture", "texts"),
    [
        (heat_map, ["passkey", "depth", "20/20", "84 to 100", "5/20", "0/20", "0 to 16", "8192"]),
        (bars, ["All", "By type", "a:0", "86.7", "strict", "loose"]),
        (layer_lines, ["needle recall", "layer", "recall, %", "float32", "fp8"]),
        (layer_map, ["chosen", "needle", "position, tokens", "layer"]),
        (before_after, ["before: old", "after: new", "Metric", "86.7", "87.8"]),
    ],
)
def test_pictures(picture: Callable[[], str], texts: list[str]) -> None:
    svg = picture()
    shown = [element.text or "" for element in ET.fromstring(svg).iter() if element.text]
    for text in texts:
        assert any(text in one for one in shown), text
    assert svg == picture()
    assert svg.endswith("</svg>\n") and "nan" not in svg
    assert len(svg) < 60_000


def test_an_empty_cell_of_a_heat_map_stays_empty() -> None:
    assert heat_map().count("/20<") == heat_map().count(" to ") == 3


def test_shapes_are_checked() -> None:
    labels = {"title": "", "row_label": "", "column_label": ""}
    with pytest.raises(ShapeError, match=r"\(2, 2\).*\(1, 2\)"):
        plots.heat_map(PASSED, PASSED, rows=["a"], columns=["b", "c"], **labels)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        plots.layer_map(np.zeros(4), tokens=4, title="")


def test_a_missing_matplotlib_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(BackendUnavailable, match="pip install") as error:
        plots.require()
    assert "\n" not in str(error.value)
