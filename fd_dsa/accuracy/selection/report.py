"""What the command `selection` tells: tables, a JSON file and two pictures.

Everything is made from the JSON alone, so figures and pictures of a folder always agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fd_dsa.accuracy.plots import layer_lines, layer_map
from fd_dsa.accuracy.report import Table, as_json, page, picture
from fd_dsa.accuracy.selection.measure import ATTENDS, INDEXER, LAST, RANDOM

MAP_FILE, LINES_FILE, JSON_FILE = "selection.svg", "recall.svg", "selection.json"
_BINS = 512
_NAMES = {INDEXER: "indexer", LAST: "last keys", RANDOM: "random keys"}


def parts(result: Mapping[str, Any]) -> list[str | Table]:
    """Paragraphs and tables of a result.

    Args:
        result: `settings` and `runs`, as selection.json holds them.
    """
    runs = [run for run in result["runs"] if "layers" in run]
    refused = [run for run in result["runs"] if "layers" not in run]
    found: list[str | Table] = [_preface(result["settings"]), _summary(runs)]
    found += [
        f"Not run: {run['provider']}, {run['kv_cache_dtype']}: {run['unavailable']}"
        for run in refused
    ]
    return found + [_details(run) for run in runs]


def files(result: Mapping[str, Any]) -> dict[str, str]:
    """The files of a result by name: report, JSON, pictures of its first run at full length."""
    runs = [run for run in result["runs"] if "layers" in run]
    longest = max(runs, key=lambda run: run["length"])
    told = parts(result)
    told[1:1] = [
        picture(MAP_FILE, "keys that each layer's indexer chose for one query"),
        picture(LINES_FILE, "attention mass on the selected keys, layer by layer"),
    ]
    return {
        JSON_FILE: as_json(dict(result)),
        "report.md": page("Selection", told),
        MAP_FILE: selection_map(longest),
        LINES_FILE: recall_lines(longest),
    }


def selection_map(run: Mapping[str, Any]) -> str:
    """SVG: where the keys lie that each layer chose for the first token of the hidden number."""
    example = run["example"]
    num_keys, bins = example["num_keys"], min(_BINS, example["num_keys"])
    edges = np.linspace(0, num_keys, bins + 1)
    shares = [np.histogram(chosen, edges)[0] / np.diff(edges) for chosen in example["selected"]]
    labels = [
        f"{layer['layer']} (looks for it)" if layer["attends"] else str(layer["layer"])
        for layer in run["layers"]
    ]
    needle = example["needle"]
    return layer_map(
        np.minimum(shares, 1.0),
        tokens=num_keys,
        title=f"{run['index_topk']} keys chosen of {num_keys}, for the next token of the number",
        marks={"hidden number": (needle, needle + 1)},
        layers=labels,
    )


def recall_lines(run: Mapping[str, Any]) -> str:
    """SVG: attention mass on the selected keys over the layers, beside the two controls."""
    series = {
        _NAMES[selector]: [layer["attention_mass_recall"][selector] for layer in run["layers"]]
        for selector in _NAMES
    }
    return layer_lines(
        series,
        title=f"{run['index_topk']} of about {run['length']} keys, {run['kv_cache_dtype']} caches",
        value_label="attention mass on the selected keys",
    )


def _preface(settings: Mapping[str, Any]) -> str:
    """What was run, in words."""
    return (
        f"Model {settings['model']}: {settings['texts']} texts of each length with a hidden "
        f"5-digit number, {settings['queries']} further queries a text, seed {settings['seed']}. "
        f"A layer looks for the number where its strongest head gives it at least {ATTENDS:.0%} "
        "of its dense attention; recall says nothing of the others. Random keys: the mean of 16 "
        "sets a query."
    )


def _summary(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each run."""
    rows = []
    for run in runs:
        looking = [layer for layer in run["layers"] if layer["attends"]]
        exact = [layer["exactness"] for layer in run["layers"] if layer["has_indexer"]]
        recalls = [
            _percent(_mean([layer["needle_recall"][selector] for layer in looking]))
            for selector in (INDEXER, LAST, RANDOM)
        ]
        masses = [
            _percent(_mean([layer["attention_mass_recall"][selector] for layer in run["layers"]]))
            for selector in (INDEXER, LAST, RANDOM)
        ]
        rows.append(
            (
                f"{run['provider']}, {run['kv_cache_dtype']}",
                str(run["length"]),
                ", ".join(str(layer["layer"]) for layer in looking) or "none",
                " / ".join(recalls),
                " / ".join(masses),
                _percent(min(exact)) if exact else "-",
            )
        )
    columns = (
        "provider, caches",
        "tokens",
        "layers that look",
        "needle recall, %",
        "attention mass, %",
        "exact, %",
    )
    notes = (
        "Recall and mass: the indexer's keys / as many last keys / random ones. Recall: mean over "
        "the layers that look for the number. Mass: mean over all layers. Exact: share of the "
        "best keys by scores in NumPy that were chosen, in the worst layer.",
    )
    return Table("All runs", columns, tuple(rows), notes)


def _details(run: Mapping[str, Any]) -> Table:
    """A row for each layer of a run."""
    rows = []
    for layer in run["layers"]:
        recall, mass = layer["needle_recall"], layer["attention_mass_recall"]
        told = " / ".join(_percent(recall[s]) for s in (INDEXER, LAST, RANDOM))
        rows.append(
            (
                str(layer["layer"]) + ("" if layer["has_indexer"] else " (shared)"),
                _percent(layer["strongest_head"]),
                told if layer["attends"] else "no head attends",
                " / ".join(_percent(mass[s]) for s in (INDEXER, LAST, RANDOM)),
                _percent(layer["least_attention_mass_recall"]),
                "-" if layer["exactness"] is None else _percent(layer["exactness"]),
            )
        )
    served = ", ".join(f"{name} by {by}" for name, by in sorted(run["served_by"].items()))
    title = f"{run['provider']}, {run['kv_cache_dtype']} caches, {run['length']} tokens"
    columns = (
        "layer",
        "strongest head on the needle, %",
        "needle recall, %",
        "attention mass, %",
        "worst query",
        "exact, %",
    )
    return Table(f"{title}, {run['index_topk']} keys", columns, tuple(rows), (f"{served}.",))


def _percent(share: float | None) -> str:
    """A share in percent, a dash for none."""
    return "-" if share is None else f"{100 * share:.1f}"


def _mean(values: Sequence[float]) -> float | None:
    """Mean; None without values."""
    return sum(values) / len(values) if values else None
