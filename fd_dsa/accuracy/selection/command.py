"""`selection`: recall of the indexer's selection by cache, length and provider."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import track

from fd_dsa.accuracy.embedded import OpenModel, open_model, read_config
from fd_dsa.accuracy.retrieval.plan import Limits, parse_lengths
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
from fd_dsa.command_line.report import Table, Terminal, as_json, check_folder, page, publish
from fd_dsa.command_line.values import add_numbers, check_prompt_tokens
from fd_dsa.config import EngineConfig
from fd_dsa.environment import quiet
from fd_dsa.errors import BackendUnavailable, ConfigError, renaming
from fd_dsa.ops.providers import asking_for, parse

# room for the answer and the end of the template after it
_ANSWER_ROOM = 64
_LENGTHS_OF_TOPK = 8
# flags of the engine, as this command has them
_NAMES = {"--model": "MODEL", "--device": "--providers", "--kv-cache-dtype": "--kv-cache-dtypes"}


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
        help="tokens of a prompt, above index_topk (default: 8 x index_topk, or the context)",
    )
    parser.add_argument(
        "--kv-cache-dtypes",
        nargs="+",
        metavar="DTYPE",
        choices=tuple(CACHE_FORMATS),
        default=tuple(CACHE_FORMATS),
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
        ("--seed", int, 0, 0, "of texts"),
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report and JSON")
    parser.set_defaults(run=run)


@renaming(_NAMES)
def run(args: argparse.Namespace) -> int:
    """Measure, print and write. Returns 0 if at least one setting could be measured."""
    providers = {text: _provider(text) for text in args.providers}
    lengths = _lengths(args)
    check_prompt_tokens("--texts and --lengths", args.texts * sum(lengths))
    if args.out is not None:
        check_folder(args.out)
    runs: list[dict[str, Any]] = []
    for text, asked in providers.items():
        with asking_for(asked):
            runs += _runs(args, text, lengths)
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


def _lengths(args: argparse.Namespace) -> list[int]:
    config = read_config(args.model, args.index_topk)
    topk = config.index_topk
    limits = Limits(topk, config.max_position_embeddings, _ANSWER_ROOM)
    asked = args.lengths or [min(_LENGTHS_OF_TOPK * topk, limits.longest)]
    lengths = parse_lengths(",".join(map(str, asked)), limits)
    if lengths[0] <= topk:
        raise ConfigError(
            f"--lengths: got {lengths[0]}, allowed: above index_topk {topk}, since up to there "
            "every key is chosen"
        )
    return list(lengths)


def _runs(args: argparse.Namespace, provider: str, lengths: list[int]) -> list[dict[str, Any]]:
    """Return a JSON object per cache dtype and length, or the reason of a failure."""
    device, *operators = provider.split(",")
    runs = []
    for dtype in args.kv_cache_dtypes:
        known = {"provider": provider, "kv_cache_dtype": dtype}
        try:
            with renaming(_NAMES), quiet():
                config = EngineConfig(
                    args.model,
                    index_topk=args.index_topk,
                    max_model_len=lengths[-1] + _ANSWER_ROOM,
                    device=device,
                    kv_cache_dtype=dtype,
                    max_num_batched_tokens=args.max_num_batched_tokens,
                )
                model = open_model(config)
                known["provider"] = ",".join([model.device, *operators])
                runs += [known | _measured(args, model, dtype, length) for length in lengths]
        except (ConfigError, BackendUnavailable) as error:
            if len(args.kv_cache_dtypes) == len(args.providers) == 1:
                raise
            runs.append(known | {"unavailable": str(error)})
    return runs


def _measured(
    args: argparse.Namespace, model: OpenModel, dtype: str, length: int
) -> dict[str, Any]:
    from fd_dsa.ops.providers import device_kind, table

    what = f"{model.device}, {dtype} caches, {length} tokens"
    texts = needle_texts(model, length, args.texts, args.seed)
    bar = track(texts, what, args.texts, console=Terminal(stderr=True), transient=True)
    figures = measure(model, bar, num_queries=args.queries)
    kind = device_kind(model.sequence.runner.caches[0])
    return {
        "device": model.device,
        "length": length,
        "index_topk": model.config.index_topk,
        "served_by": {op: by[kind].provider for op, by in table().items() if kind in by},
        "layers": [figure.to_json() for figure in figures],
    }


def parts(result: Mapping[str, Any]) -> list[str | Table]:
    """Return paragraphs and tables of a result in the form of selection.json."""
    settings = result["settings"]
    about = (
        f"Model {settings['model']}: {settings['texts']} texts of each length with a hidden "
        f"5-digit number, {settings['queries']} further queries a text, seed {settings['seed']}. "
        f"A layer looks for the number where its strongest head gives it at least {ATTENDS:.0%} "
        "of its dense attention; recall does not cover the others. Its interval is Wilson's of "
        "95 %, each token of a number a trial. Mass: attention mass on the chosen keys. Exact: "
        "share of the best keys by scores in NumPy that were chosen. All in percent."
    )
    return [about, *map(_part, result["runs"])]


def _part(run: Mapping[str, Any]) -> str | Table:
    """Return the table of a run, or the reason of its failure."""
    if "layers" not in run:
        return f"Not run: {run['provider']}, {run['kv_cache_dtype']}: {run['unavailable']}"
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
        rows.append((*row, *(_percent(mass[s]) for s in SELECTORS), _percent(layer["exactness"])))
    served = ", ".join(f"{name} by {by}" for name, by in sorted(run["served_by"].items()))
    columns = [f"{figure}: {s}" for figure in ("recall", "mass") for s in SELECTORS]
    title = f"{run['provider']}, {run['kv_cache_dtype']} caches, {run['length']} tokens"
    return Table(
        f"{title}, {run['index_topk']} keys",
        ("layer", "head on number", *columns, "exact"),
        tuple(rows),
        (f"{served}.",),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
