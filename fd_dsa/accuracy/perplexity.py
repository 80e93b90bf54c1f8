"""`perplexity`: how surprised a model is by a text, told in one pass and without generating."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.accuracy.embedded import OpenModel, open_model, progress, read_config
from fd_dsa.accuracy.losses import Losses, measure, stretches, windows_of
from fd_dsa.accuracy.report import Table, as_json, check_folder, page, show, write_files
from fd_dsa.config import EngineConfig
from fd_dsa.environment import quiet
from fd_dsa.errors import ConfigError

JSON_FILE = "perplexity.json"
DEFAULT_TEXT = "wizard_in_oz.txt"


def default_text() -> str:
    """Two chapters of an old book, in the public domain (`data/wizard_in_oz.NOTICE`)."""
    file = files("fd_dsa.accuracy") / "data" / DEFAULT_TEXT
    return file.read_text("utf-8")


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the parser of `perplexity`."""
    parser = subparsers.add_parser(
        "perplexity",
        allow_abbrev=False,
        help="perplexity of a text in one pass",
        description="Read a text through the embedded engine and tell the likelihood of its "
        "tokens; nothing is generated.",
    )
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="file in UTF-8 (default: a tale in the package)"
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: the demo model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu (default: auto)")
    parser.add_argument(
        "--kv-cache-dtype", metavar="DTYPE", default="auto", help="format of the caches"
    )
    for flag, text in (
        ("--context", "tokens of a window (default: the model's context)"),
        ("--index-topk", "keys to choose (default: the model's number)"),
    ):
        parser.add_argument(flag, metavar="N", type=int, help=text)
    parser.add_argument(
        "--overlap",
        metavar="N",
        type=int,
        default=0,
        help="tokens that a window reads again, unscored, before its own (default: 0)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        metavar="N",
        type=int,
        default=512,
        help="tokens of a chunk (default: 512)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="read the text again with all keys chosen, and tell what the selection costs",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for report and JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write.

    Raises:
        ConfigError: a flag, the file or the model.
        BackendUnavailable: Paddle is missing, or has no such device.
    """
    text = default_text() if args.text is None else _read(Path(args.text))
    if args.out is not None:
        check_folder(Path(args.out))
    most = read_config(args.model, args.index_topk).max_position_embeddings
    if args.context is not None and not 2 <= args.context <= most:
        raise ConfigError(f"--context: got {args.context}, allowed: 2 to {most}, the model's own")
    sparse, model = _read_through(args, text, args.index_topk)
    length, index_topk = model.max_model_len, model.model_config.index_topk
    settings = _settings(args, model)
    # two models at once would need twice the memory
    del model
    dense = _read_through(args, text, length)[0] if args.dense else None
    result = {
        "settings": settings,
        "sparse": sparse.to_json(),
        "dense": None if dense is None else dense.to_json(),
        "stretches": _stretches_json(sparse, dense, index_topk),
    }
    parts = report_parts(result)
    if args.out is not None:
        texts = {JSON_FILE: as_json(result), "report.md": page("Perplexity", parts)}
        write_files(Path(args.out), texts)
    show(parts)
    return 0


def _read(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is no UTF-8; give a text in UTF-8") from None


def _read_through(
    args: argparse.Namespace, text: str, index_topk: int | None
) -> tuple[Losses, OpenModel]:
    """Losses of the text, and the model that read it."""
    with quiet():
        model = open_model(
            args.model,
            index_topk=index_topk,
            max_model_len=args.context,
            device=args.device,
            kv_cache_dtype=args.kv_cache_dtype,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        total = len(windows_of(model, text, overlap=args.overlap))
        with progress(f"{model.model_config.index_topk} keys", total) as tell:
            losses = measure(model, text, overlap=args.overlap, tell=tell)
    return losses, model


def _settings(args: argparse.Namespace, model: OpenModel) -> dict[str, Any]:
    """What decides the figures."""
    return {
        "model": EngineConfig(model=args.model).model_path.name,
        "text": DEFAULT_TEXT if args.text is None else Path(args.text).name,
        "device": model.device,
        "kv_cache_dtype": model.engine_config.cache_dtype,
        "context": model.max_model_len,
        "overlap": args.overlap,
        "index_topk": model.model_config.index_topk,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }


def _stretches_json(sparse: Losses, dense: Losses | None, index_topk: int) -> list[dict[str, Any]]:
    """A JSON object for each stretch."""
    found = []
    for first, last, inside in stretches(sparse, index_topk):
        entry = {
            "first": first,
            "last": last,
            "tokens": int(inside.sum()),
            "nats_per_token": float(sparse.nats[inside].mean()),
        }
        if dense is not None:
            difference = sparse.nats[inside] - dense.nats[inside]
            entry["dense_nats_per_token"] = float(dense.nats[inside].mean())
            entry["mean_difference"] = float(difference.mean())
            entry["largest_difference"] = float(np.abs(difference).max())
        found.append(entry)
    return found


def report_parts(result: Mapping[str, Any]) -> list[str | Table]:
    """Paragraphs and tables of a result, as perplexity.json holds it."""
    settings, sparse, dense = result["settings"], result["sparse"], result["dense"]
    windows = sparse["windows"]
    passes = (
        "One pass."
        if windows == 1
        else f"The text is longer than the context: {windows} windows, "
        f"{settings['overlap']} tokens of each read again; tokens early in a window know less."
    )
    told = (
        f"Model {settings['model']}, text {settings['text']}: {sparse['tokens']} tokens, "
        f"{sparse['characters']} characters, context {settings['context']}, "
        f"{settings['index_topk']} keys chosen, {settings['kv_cache_dtype']} caches. {passes}"
    )
    rows = [_figures("the model's selection", sparse)]
    if dense is not None:
        rows.append(_figures("all keys", dense))
    columns = ("attention", "perplexity", "nats a token", "bits a character", "bits a byte")
    return [told, Table("Perplexity", columns, tuple(rows)), _stretch_table(result)]


def _figures(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the first table."""
    perplexity = found["perplexity"]
    return (
        name,
        "too large" if perplexity is None else f"{perplexity:.3f}",
        f"{found['nats_per_token']:.4f}",
        f"{found['bits_per_character']:.4f}",
        f"{found['bits_per_byte']:.4f}",
    )


def _stretch_table(result: Mapping[str, Any]) -> Table:
    """Losses by the number of keys before a token."""
    columns = ["keys", "tokens", "nats a token"]
    if result["dense"] is not None:
        columns += ["with all keys", "difference", "largest of one token"]
    rows = []
    for entry in result["stretches"]:
        row = [f"{entry['first']} to {entry['last']}", str(entry["tokens"])]
        row.append(f"{entry['nats_per_token']:.4f}")
        if result["dense"] is not None:
            row.append(f"{entry['dense_nats_per_token']:.4f}")
            row.append(f"{entry['mean_difference']:+.4f}")
            row.append(f"{entry['largest_difference']:.4f}")
        rows.append(tuple(row))
    topk = result["settings"]["index_topk"]
    note = f"Up to {topk} keys all of them are chosen; no jump may stand behind that border."
    return Table("By the number of keys that a token sees", tuple(columns), tuple(rows), (note,))
