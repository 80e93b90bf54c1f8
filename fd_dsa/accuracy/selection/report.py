"""What the command `selection` tells: tables, a JSON file and two pictures.

Everything is made from the JSON alone, so figures and pictures of a folder always agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fd_dsa.accuracy.plots import layer_lines, layer_map, token_map
from fd_dsa.accuracy.report import Table, as_json, page, picture
from fd_dsa.accuracy.selection.measure import ATTENDS, INDEXER, LAST, RANDOM, SELECTORS

MAP_FILE, NEEDLE_FILE, LINES_FILE = "selection.svg", "needle.svg", "recall.svg"
JSON_FILE = "selection.json"
_BINS = 512
_HEADINGS = (
    *("recall: indexer", "last keys", "random"),
    *("mass: indexer", "last keys", "random"),
)
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
    longest = pictured(result["runs"])
    told = parts(result)
    told[1:1] = [
        picture(MAP_FILE, "keys that each layer's indexer chose for one query"),
        picture(NEEDLE_FILE, "tokens around the hidden number that each layer chose"),
        picture(LINES_FILE, "attention mass on the selected keys, layer by layer"),
    ]
    return {
        JSON_FILE: as_json(dict(result)),
        "report.md": page("Selection", told),
        MAP_FILE: selection_map(longest),
        NEEDLE_FILE: needle_map(longest),
        LINES_FILE: recall_lines(longest),
    }


def pictured(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run that pictures are made of: the first one of full length."""
    return max((run for run in runs if "layers" in run), key=lambda run: run["length"])


def selection_map(run: Mapping[str, Any]) -> str:
    """SVG: where the keys lie that each layer chose for the first token of the hidden number."""
    example = run["example"]
    num_keys = example["num_keys"]
    # all stretches are of so many tokens, the last one may reach past the end
    width = -(-num_keys // _BINS)
    edges = np.arange(0, num_keys + width, width)
    shares = [np.histogram(chosen, edges)[0] / width for chosen in example["selected"]]
    needle = example["needle"]
    return layer_map(
        shares,
        tokens=int(edges[-1]),
        title=f"{run['index_topk']} keys chosen of {num_keys}, for the next token of the number",
        marks={"hidden number": (needle, needle + example["num_needle_tokens"])},
        layers=_labels(run),
    )


def needle_map(run: Mapping[str, Any]) -> str:
    """SVG: which tokens around the hidden number each layer chose for the number's queries."""
    example = run["example"]
    tokens = [token.replace("\n", "\\n") for token in example["near"]]
    title = "Around the hidden number: share of its queries that chose a token"
    return token_map(example["shares"], tokens=tokens, title=title, layers=_labels(run))


def _labels(run: Mapping[str, Any]) -> list[str]:
    """A label for each layer."""
    return [
        f"{layer['layer']} (looks for it)" if layer["attends"] else str(layer["layer"])
        for layer in run["layers"]
    ]


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
        "of its dense attention; recall says nothing of the others. Its interval is Wilson's of "
        "95 %, each token of a number a trial. Random keys: the mean of 16 sets a query."
    )


def _summary(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each run."""
    rows = []
    for run in runs:
        layers = run["layers"]
        looking = [layer for layer in layers if layer["attends"]]
        exact = [layer["exactness"] for layer in layers if layer["has_indexer"]]
        row = [
            f"{run['provider']}, {run['kv_cache_dtype']}",
            str(run["length"]),
            ", ".join(str(layer["layer"]) for layer in looking) or "none",
        ]
        for found, name in ((looking, "needle_recall"), (layers, "attention_mass_recall")):
            row += [_percent(_mean([layer[name][s] for layer in found])) for s in SELECTORS]
        rows.append((*row, _percent(min(exact, default=None))))
    columns = ("provider, caches", "tokens", "layers that look", *_HEADINGS, "exact")
    notes = (
        "In percent. Recall: mean over the layers that look for the number. Mass: attention mass "
        "on the chosen keys, mean over all layers. Exact: share of the best keys by scores in "
        "NumPy that were chosen, in the worst layer.",
    )
    return Table("All runs", columns, tuple(rows), notes)


def _details(run: Mapping[str, Any]) -> Table:
    """A row for each layer of a run."""
    rows = []
    for layer in run["layers"]:
        recall, mass = layer["needle_recall"], layer["attention_mass_recall"]
        marks = "" if layer["has_indexer"] else ", shared"
        marks += "" if layer["attends"] else ", no head attends"
        row = [f"{layer['layer']}{marks}", _percent(layer["strongest_head"])]
        if layer["attends"]:
            low, high = layer["needle_recall_interval"]
            told = f"{_percent(recall[INDEXER])} [{_percent(low)}, {_percent(high)}]"
            row += [told, _percent(recall[LAST]), _percent(recall[RANDOM])]
        else:
            row += ["-"] * len(SELECTORS)
        row += [_percent(mass[s]) for s in SELECTORS]
        row += [_percent(layer["least_attention_mass_recall"]), _percent(layer["exactness"])]
        rows.append(tuple(row))
    served = ", ".join(f"{name} by {by}" for name, by in sorted(run["served_by"].items()))
    title = f"{run['provider']}, {run['kv_cache_dtype']} caches, {run['length']} tokens"
    columns = ("layer", "head on number", *_HEADINGS, "worst mass", "exact")
    return Table(f"{title}, {run['index_topk']} keys", columns, tuple(rows), (f"{served}.",))


def _percent(share: float | None) -> str:
    """A share in percent, a dash for none."""
    return "-" if share is None else f"{100 * share:.1f}"


def _mean(values: Sequence[float]) -> float | None:
    """Mean; None without values."""
    return sum(values) / len(values) if values else None
