"""`selection`: recall of the indexer's selection by cache, length and provider."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from fd_dsa.accuracy.embedded import OpenModel, open_model, read_config
from fd_dsa.accuracy.selection.measure import (
    ATTENDS,
    INDEXER,
    LAST,
    RANDOM,
    SELECTORS,
    measure,
    needle_texts,
)
from fd_dsa.cache_formats import CACHE_FORMATS
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import Table, as_json, check_folder, page, publish
from fd_dsa.command_line.values import add_numbers
from fd_dsa.config import EngineConfig
from fd_dsa.environment import quiet
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.ops.providers import asking_for, parse

CACHE_DTYPES = tuple(CACHE_FORMATS)
# room for the answer and the end of the template after it
_ANSWER_ROOM = 64
_LENGTHS_OF_TOPK = 8
_HEADINGS = tuple(f"{n}{s}" for n in ("recall: ", "mass: ") for s in ("indexer", "last", "random"))


def fill_parser(parser: Parser) -> None:
    parser.description = (
        "Hide numbers in texts, run them through the embedded engine, and report for every layer "
        "how much of dense attention falls on the keys that its indexer chose, and whether the "
        "hidden number is among them."
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder of a checkpoint (default: the demo model)"
    )
    parser.add_argument(
        "--lengths",
        metavar="N",
        nargs="+",
        type=int,
        help="tokens of a prompt, above index_topk (default: 8 x index_topk, or the context)",
    )
    parser.add_argument(
        "--kv-cache-dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=CACHE_DTYPES,
        default=CACHE_DTYPES,
        help="formats of the caches (default: float32 bfloat16 fp8_ds_mla)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="DEVICE[,OP=PROVIDER]",
        default=("auto",),
        help="where the model runs and whose kernels serve: cpu, gpu, gpu,topk=triton, "
        "gpu,topk=custom_op (default: auto)",
    )
    add_numbers(
        parser,
        ("--index-topk", int, 1, None, "keys to choose (default: the model's number)"),
        ("--texts", int, 1, 8, "texts of each length"),
        ("--queries", int, 1, 32, "tokens of a text to compare at, not counting the answer's"),
        ("--max-num-batched-tokens", int, 1, 512, "tokens of a chunk of the prompt"),
        ("--seed", int, 0, 0, "of texts and random sets"),
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report and JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write. Returns 0 if at least one setting could be measured."""
    providers = {text: _provider(text) for text in args.providers}
    args.lengths = _checked_lengths(args)
    if args.out is not None:
        check_folder(args.out)
    runs: list[dict[str, Any]] = []
    for text, asked in providers.items():
        with asking_for(asked):
            runs += _runs(args, text)
    if not any("layers" in found for found in runs):
        raise ConfigError(runs[0]["unavailable"])
    decisive = {"model": EngineConfig(model=args.model).model_path.name}
    for name in ("texts", "queries", "seed", "max_num_batched_tokens"):
        decisive[name] = getattr(args, name)
    result = {"settings": decisive, "runs": runs}
    text = page("Selection", parts(result))
    publish(parts(result), args.out, {"selection.json": as_json(result), "report.md": text})
    return 0


def _provider(text: str) -> dict[str, str]:
    """Return operator -> provider of a setting."""
    device, *operators = text.split(",")
    EngineConfig(device=device)
    return parse(operators, "--providers", text)


def _checked_lengths(args: argparse.Namespace) -> list[int]:
    config = read_config(args.model, args.index_topk)
    topk, longest = config.index_topk, config.max_position_embeddings - _ANSWER_ROOM
    lengths: list[int] = args.lengths or [min(_LENGTHS_OF_TOPK * topk, longest)]
    for length in lengths:
        if length <= topk:
            raise ConfigError(
                f"--lengths: got {length}, allowed: above index_topk {topk}, since up to there "
                "every key is chosen"
            )
        if length > longest:
            raise ConfigError(
                f"--lengths: got {length}, allowed: at most {longest}, since the answer needs "
                f"{_ANSWER_ROOM} tokens of the context too"
            )
    return lengths


def _runs(args: argparse.Namespace, provider: str) -> list[dict[str, Any]]:
    """Return a JSON object per cache dtype and length, or the reason of a failure."""
    device, *operators = provider.split(",")
    runs = []
    for dtype in args.kv_cache_dtypes:
        known = {"provider": provider, "kv_cache_dtype": dtype}
        try:
            with quiet():
                model = open_model(
                    args.model,
                    index_topk=args.index_topk,
                    max_model_len=max(args.lengths) + _ANSWER_ROOM,
                    device=device,
                    kv_cache_dtype=dtype,
                    max_num_batched_tokens=args.max_num_batched_tokens,
                )
                known["provider"] = ",".join([model.device, *operators])
                runs += [known | _measured(args, model, length) for length in args.lengths]
        except (ConfigError, BackendUnavailable) as error:
            if len(args.kv_cache_dtypes) == len(args.providers) == 1:
                raise
            runs.append(known | {"unavailable": str(error)})
    return runs


def _measured(args: argparse.Namespace, model: OpenModel, length: int) -> dict[str, Any]:
    from fd_dsa.ops.providers import device_kind, table

    what = f"{model.device}, {model.engine_config.kv_cache_dtype} caches, {length} tokens"
    texts = needle_texts(model, length, args.texts, args.seed)
    bar = track(texts, what, args.texts, console=Console(stderr=True), transient=True)
    figures = measure(model, bar, num_queries=args.queries, seed=args.seed)
    kind = device_kind(model.sequence.runner.caches[0])
    return {
        "device": model.device,
        "length": length,
        "index_topk": model.model_config.index_topk,
        "served_by": {op: by[kind].provider for op, by in table().items() if kind in by},
        "layers": [figure.to_json() for figure in figures],
    }


def parts(result: Mapping[str, Any]) -> list[str | Table]:
    """Return paragraphs and tables of a result in the form of selection.json."""
    settings = result["settings"]
    runs = [run for run in result["runs"] if "layers" in run]
    about = (
        f"Model {settings['model']}: {settings['texts']} texts of each length with a hidden "
        f"5-digit number, {settings['queries']} further queries a text, seed {settings['seed']}. "
        f"A layer looks for the number where its strongest head gives it at least {ATTENDS:.0%} "
        "of its dense attention; recall does not cover the others. Its interval is Wilson's of "
        "95 %, each token of a number a trial. Random keys: the mean of 16 sets a query."
    )
    refused = [
        f"Not run: {run['provider']}, {run['kv_cache_dtype']}: {run['unavailable']}"
        for run in result["runs"]
        if "layers" not in run
    ]
    return [about, _summary(runs), *refused, *map(_details, runs)]


def _summary(runs: Sequence[Mapping[str, Any]]) -> Table:
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
            for s in SELECTORS:
                mean = sum(layer[name][s] for layer in found) / len(found) if found else None
                row.append(_percent(mean))
        rows.append((*row, _percent(min(exact, default=None))))
    columns = ("provider, caches", "tokens", "layers that look", *_HEADINGS, "exact")
    notes = (
        "In percent. Recall: mean over the layers that look for the number. Mass: attention mass "
        "on the chosen keys, mean over all layers. Exact: share of the best keys by scores in "
        "NumPy that were chosen, in the worst layer.",
    )
    return Table("All runs", columns, tuple(rows), notes)


def _details(run: Mapping[str, Any]) -> Table:
    rows = []
    for layer in run["layers"]:
        recall, mass = layer["needle_recall"], layer["attention_mass_recall"]
        marks = "" if layer["has_indexer"] else ", shared"
        marks += "" if layer["attends"] else ", no head attends"
        row = [f"{layer['layer']}{marks}", _percent(layer["strongest_head"])]
        if layer["attends"]:
            low, high = layer["needle_recall_interval"]
            indexer = f"{_percent(recall[INDEXER])} [{_percent(low)}, {_percent(high)}]"
            row += [indexer, _percent(recall[LAST]), _percent(recall[RANDOM])]
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
    return "-" if share is None else f"{100 * share:.1f}"
