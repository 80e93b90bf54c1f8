"""`perplexity`: computes the loss of every token of a text, without generating any.

The text runs through the embedded engine in chunks, like a prompt, and the head computes the logits
of all tokens. A text longer than the context is split into windows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fd_dsa.accuracy.embedded import OpenModel, SingleSequenceRunner, open_model, read_config
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import Table, check_folder, publish
from fd_dsa.command_line.values import add_numbers
from fd_dsa.config import EngineConfig
from fd_dsa.environment import quiet
from fd_dsa.errors import ConfigError, FdDsaError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer

_LOGITS_AT_ONCE = 1 << 24
_NEIGHBOURS = 8
DEFAULT_TEXT = Path(__file__).with_name("data") / "wizard_in_oz.txt"
"""Two chapters of an old book in the public domain (`data/wizard_in_oz.NOTICE`)."""


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood of every scored token, in nats.

    Attributes:
        nats: float64 [n].
        num_keys: int64 [n], number of keys visible to the preceding token, which predicts this one.
        characters, num_bytes: length of the scored text.
    """

    nats: np.ndarray
    num_keys: np.ndarray
    num_windows: int
    characters: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token, infinite if it is too large for a double."""
        mean = float(self.nats.mean())
        return math.exp(mean) if mean < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return the figures.

        Bits per character and per byte do not depend on the tokenizer.
        """
        bits = float(self.nats.sum()) / math.log(2)
        return {
            "tokens": len(self.nats),
            "windows": self.num_windows,
            "characters": self.characters,
            "bytes": self.num_bytes,
            "nats_per_token": float(self.nats.mean()),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_character": bits / self.characters,
            "bits_per_byte": bits / self.num_bytes,
        }


def cut(
    token_ids: Sequence[int], context: int, lead: Sequence[int] = ()
) -> tuple[int, list[tuple[int, ...]]]:
    """Split a text into windows in which every token is scored once.

    Without `lead` the first token of the text is not scored.

    Args:
        context: maximum number of tokens of a window, including `lead`.
        lead: tokens at the beginning of every window, such as BOS.

    Returns:
        The index of the first scored token of a window (at least 1), and the tokens of each window.
    """
    # the preceding tokens predict a token, so the first one of a text needs a lead
    first = 0 if lead else 1
    if len(token_ids) <= first:
        raise ConfigError(f"the text has {len(token_ids)} tokens, too few to predict one")
    room = context - len(lead) - first
    if room < 1:
        raise ConfigError(f"--context: got {context}, allowed: at least {context - room + 1}")
    starts = range(first, len(token_ids), room)
    return len(lead) + first, [(*lead, *token_ids[at - first : at + room]) for at in starts]


def token_losses(
    sequence: SingleSequenceRunner,
    token_ids: Sequence[int],
    on_read: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """Return float64 [n - 1]: -log p of every token but the first, given the ones before.

    Args:
        on_read: called after every chunk with its number of tokens.
    """
    found = []
    for start, hidden in sequence.chunks(token_ids):
        following = np.asarray(token_ids[start + 1 : start + 1 + int(hidden.shape[0])])
        size = max(1, _LOGITS_AT_ONCE // sequence.runner.vocab_size)
        for first in range(0, len(following), size):
            part = following[first : first + size]
            logits = sequence.logits(hidden[first : first + len(part)])
            found.append(losses_of(logits, part))
        on_read(int(hidden.shape[0]))
    return np.concatenate(found) if found else np.empty(0)


def losses_of(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Return float64 [n]: -log softmax(logits)[token] by row of float32 [n, vocab_size]."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1)[:, None]
    chosen = wide[np.arange(len(wide)), token_ids]
    return np.log(np.exp(wide).sum(axis=1)) - chosen


def measure(model: OpenModel, text: str) -> Losses:
    """Return the losses of a text, in windows of the model's context length."""
    lead = start_of_sequence(model.tokenizer)
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    first, windows = cut(token_ids, model.max_model_len, lead)
    nats, num_keys = [], []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading", total=sum(map(len, windows)))
        for index, window in enumerate(windows):
            on_read = partial(progress.advance, bar)
            losses = token_losses(model.sequence, window, on_read)
            if not np.isfinite(losses).all():
                place = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
                raise FdDsaError(f"window {index}: the loss of token {place} is not finite")
            nats.append(losses[first - 1 :])
            num_keys.append(np.arange(first, len(window)))
    if not lead:
        text = text.removeprefix(model.tokenizer.decode(windows[0][:1]))
    size = len(text), len(text.encode())
    return Losses(np.concatenate(nats), np.concatenate(num_keys), len(windows), *size)


def start_of_sequence(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that begin a sequence: the tokenizer's own, or BOS, or no token."""
    ids = tokenizer.encode("")
    if ids or tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id]


def stretches(losses: Losses, index_topk: int) -> list[tuple[int, int, np.ndarray]]:
    """Group tokens by their number of keys.

    Up to `index_topk` keys attention is dense. The few tokens on each side of that border have
    their own groups. Later groups are twice as long as the one before.

    Returns:
        (first, last, bool [n]) of each group in order: range of keys, and mask of the tokens.
    """
    border = index_topk + 1
    edges = [0, max(1, border - _NEIGHBOURS), border, border + _NEIGHBOURS]
    while edges[-1] <= losses.num_keys.max():
        edges.append(max(edges[-1] + 1, 2 * edges[-1] // index_topk * index_topk + 1))
    found = []
    for first, end in pairwise(edges):
        inside = (losses.num_keys >= first) & (losses.num_keys < end)
        if inside.any():
            found.append((max(first, 1), end - 1, inside))
    return found


def fill_parser(parser: Parser) -> None:
    parser.description = (
        "Read a text through the embedded engine and report the likelihood of its tokens. The "
        "command generates no text."
    )
    parser.add_argument(
        "text",
        nargs="?",
        metavar="TEXT",
        type=Path,
        default=DEFAULT_TEXT,
        help="file in UTF-8 (default: a tale in the package)",
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: the demo model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or gpu (default: auto)")
    parser.add_argument(
        "--kv-cache-dtype", metavar="DTYPE", default="auto", help="format of the caches"
    )
    add_numbers(
        parser,
        ("--context", int, 2, None, "tokens of a window (default: the model's context)"),
        ("--index-topk", int, 1, None, "keys to choose (default: the model's number)"),
        ("--max-num-batched-tokens", int, 1, 512, "tokens of a chunk"),
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="read the text again with all keys chosen, and report what the selection costs",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for report and JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    text = _read(args.text)
    if args.out is not None:
        check_folder(Path(args.out))
    longest = read_config(args.model, args.index_topk).max_position_embeddings
    if args.context is not None and args.context > longest:
        raise ConfigError(
            f"--context: got {args.context}, allowed: 2 to {longest}, the model's own"
        )
    sparse, model = _read_through(args, text, args.index_topk)
    settings = {
        "model": EngineConfig(model=args.model).model_path.name,
        "text": args.text.name,
        "device": model.device,
        "kv_cache_dtype": model.engine_config.kv_cache_dtype,
        "context": model.max_model_len,
        "index_topk": model.model_config.index_topk,
        "vocab_size": model.model_config.vocab_size,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }
    # free the model, because two models at once need twice the memory
    del model
    dense = _read_through(args, text, settings["context"])[0] if args.dense else None
    result = {
        "settings": settings,
        "sparse": sparse.to_json(),
        "dense": None if dense is None else dense.to_json(),
        "stretches": _stretches_json(sparse, dense, settings["index_topk"]),
    }
    publish(args.out, "Perplexity", result, report_parts(result))
    return 0


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is no UTF-8; give a text in UTF-8") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"TEXT: {file} cannot be read ({reason})") from None


def _read_through(
    args: argparse.Namespace, text: str, index_topk: int | None
) -> tuple[Losses, OpenModel]:
    with quiet():
        model = open_model(
            args.model,
            index_topk=index_topk,
            max_model_len=args.context,
            device=args.device,
            kv_cache_dtype=args.kv_cache_dtype,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
        return measure(model, text), model


def _stretches_json(sparse: Losses, dense: Losses | None, index_topk: int) -> list[dict[str, Any]]:
    found = []
    for first, last, inside in stretches(sparse, index_topk):
        nats = sparse.nats[inside]
        entry: dict[str, Any] = {"first": first, "last": last, "tokens": len(nats)}
        entry["nats_per_token"] = float(nats.mean())
        if dense is not None:
            difference = nats - dense.nats[inside]
            entry["dense_nats_per_token"] = float(dense.nats[inside].mean())
            entry["mean_difference"] = float(difference.mean())
            entry["largest_difference"] = float(np.abs(difference).max())
        found.append(entry)
    return found


def report_parts(result: Mapping[str, Any]) -> list[str | Table]:
    """Return paragraphs and tables of a result in the form of perplexity.json."""
    settings, sparse, dense = result["settings"], result["sparse"], result["dense"]
    passes = "One pass."
    if sparse["windows"] > 1:
        passes = (
            f"The text is longer than the context: {sparse['windows']} windows; tokens early in a "
            "window know less."
        )
    about = (
        f"Model {settings['model']}, text {settings['text']}: {sparse['tokens']} tokens, "
        f"{sparse['characters']} characters, context {settings['context']}, "
        f"{settings['index_topk']} keys chosen, {settings['kv_cache_dtype']} caches. {passes}"
    )
    rows = []
    for name, found in (("the model's selection", sparse), ("all keys", dense)):
        if found is not None:
            perplexity = found["perplexity"]
            shown = "too large" if perplexity is None else f"{perplexity:.3f}"
            fields = ("nats_per_token", "bits_per_character", "bits_per_byte")
            rows.append((name, shown, *(f"{found[field]:.4f}" for field in fields)))
    columns = ("attention", "perplexity", "nats a token", "bits a character", "bits a byte")
    perplexity, size = sparse["perplexity"], settings["vocab_size"]
    notes: tuple[str, ...] = ()
    if perplexity is None or perplexity > size:
        notes = (
            f"Above {size}, the size of the vocabulary: worse than giving every token the same "
            "probability, as of a model that was not trained on such text.",
        )
    return [about, Table("Perplexity", columns, tuple(rows), notes), _stretch_table(result)]


def _stretch_table(result: Mapping[str, Any]) -> Table:
    fields = {"nats_per_token": ("nats a token", ".4f")}
    if result["dense"] is not None:
        fields["dense_nats_per_token"] = ("with all keys", ".4f")
        fields["mean_difference"] = ("difference", "+.4f")
        fields["largest_difference"] = ("largest of one token", ".4f")
    rows = [
        (
            f"{entry['first']} to {entry['last']}",
            str(entry["tokens"]),
            *(format(entry[name], form) for name, (_, form) in fields.items()),
        )
        for entry in result["stretches"]
    ]
    columns = ("keys", "tokens", *(heading for heading, _ in fields.values()))
    topk = result["settings"]["index_topk"]
    note = f"Up to {topk} keys all of them are chosen; beyond that point there should be no jump."
    return Table("By the number of keys that a token sees", columns, tuple(rows), (note,))
