"""How surprised a model is by a text: the loss of every token, which is read and never generated.

The text runs through the embedded engine in chunks, as a prompt does, and the head gives the logits
of all tokens. A text longer than the context is cut into windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fd_dsa.accuracy.embedded import OneSequence, OpenModel
from fd_dsa.errors import ConfigError, FdDsaError

if TYPE_CHECKING:
    from fd_dsa.engine.tokenizer import Tokenizer

_LOGITS_AT_ONCE = 1 << 24
_NEIGHBOURS = 8


@dataclass(frozen=True)
class Window:
    """One pass over a part of a text.

    Attributes:
        token_ids: what the model reads; first the start of a sequence, such as a BOS token, and
            tokens that another window scores.
        first: index in `token_ids` of the first token that is scored here; at least 1.
    """

    token_ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood of every scored token, in nats.

    Attributes:
        nats: float64 [n], windows one after the other.
        num_keys: int64 [n]; keys that the token before it sees, which predicts it.
        num_windows: passes.
        characters: of the text that the tokens spell; a token that is not scored is not counted.
        num_bytes: of the same text in UTF-8.
    """

    nats: np.ndarray
    num_keys: np.ndarray
    num_windows: int
    characters: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token; infinite where that is too large for a number."""
        mean = float(self.nats.mean())
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Independent of the tokenizer, as perplexity is not."""
        return float(self.nats.sum()) / math.log(2) / self.characters

    @property
    def bits_per_byte(self) -> float:
        """The same for bytes in UTF-8."""
        return float(self.nats.sum()) / math.log(2) / self.num_bytes

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON object."""
        return {
            "tokens": len(self.nats),
            "windows": self.num_windows,
            "characters": self.characters,
            "bytes": self.num_bytes,
            "nats_per_token": float(self.nats.mean()),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
        }


def cut(
    token_ids: Sequence[int], context: int, overlap: int = 0, lead: Sequence[int] = ()
) -> list[Window]:
    """Windows in which every token is scored once; without `lead` all but the text's first.

    Args:
        token_ids: of the text, at least one, without `lead` at least two.
        context: most tokens of a window, `lead` included.
        overlap: tokens before those of a later window that it reads again, unscored; without
            `lead` one at least.
        lead: tokens that every window begins with, such as BOS.

    Raises:
        ConfigError: nothing to score, or a window without room for a token of its own.
    """
    # a token is scored by what lies before it
    first = 0 if lead else 1
    if len(token_ids) <= first:
        raise ConfigError(f"the text has {len(token_ids)} tokens; none of them can be predicted")
    again, room = max(overlap, first), context - len(lead)
    if overlap < 0 or again >= room:
        raise ConfigError(
            f"--overlap: got {overlap}, allowed: 0 to {room - 1}, so that windows of {context} "
            "tokens have some of their own"
        )
    windows: list[Window] = []
    start = first
    while start < len(token_ids):
        before = again if windows else first
        end = min(len(token_ids), start - before + room)
        read = (*lead, *token_ids[start - before : end])
        windows.append(Window(read, len(lead) + before))
        start = end
    return windows


def token_losses(sequence: OneSequence, token_ids: Sequence[int]) -> np.ndarray:
    """float64 [n - 1]: -log p of every token but the first, given those before it.

    Args:
        sequence: begins anew.
        token_ids: no more than fit into its caches.
    """
    sequence.restart()
    found = []
    for start, hidden in sequence.chunks(token_ids):
        wanted = np.asarray(token_ids[start + 1 : start + 1 + int(hidden.shape[0])])
        size = max(1, _LOGITS_AT_ONCE // sequence.runner.vocab_size)
        for first in range(0, len(wanted), size):
            part = wanted[first : first + size]
            logits = sequence.logits(hidden[first : first + len(part)])
            found.append(losses_of(logits, part))
    return np.concatenate(found) if found else np.empty(0)


def losses_of(logits: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """float64 [n]: -log softmax(logits)[token] of each row.

    Args:
        logits: float32 [n, vocab_size].
        token_ids: int [n].
    """
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    wide -= top[:, None]
    chosen = wide[np.arange(len(wide)), token_ids]
    return np.log(np.exp(wide).sum(axis=1)) - chosen


def measure(
    model: OpenModel,
    text: str,
    *,
    context: int | None = None,
    overlap: int = 0,
    tell: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of a text.

    Args:
        model: open, and used by nobody else.
        text: any; special tokens written in it count as such.
        context: tokens of a window; None is all that the model was opened for.
        overlap: see `cut`.
        tell: called after every window.

    Raises:
        ConfigError: see `cut`; or `context` is longer than the model's.
        FdDsaError: a loss is no finite number.
    """
    windows = windows_of(model, text, context, overlap)
    nats, num_keys = [], []
    for index, window in enumerate(windows):
        losses = token_losses(model.sequence, window.token_ids)
        if not np.isfinite(losses).all():
            place = int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
            raise FdDsaError(f"window {index}: the loss of token {place} is not finite")
        nats.append(losses[window.first - 1 :])
        num_keys.append(np.arange(window.first, len(window.token_ids)))
        tell()
    read = text
    if not start_of_sequence(model.tokenizer):
        unscored = model.tokenizer.decode(windows[0].token_ids[:1])
        read = text.removeprefix(unscored)
    return Losses(
        np.concatenate(nats), np.concatenate(num_keys), len(windows), len(read), len(read.encode())
    )


def windows_of(
    model: OpenModel, text: str, context: int | None = None, overlap: int = 0
) -> list[Window]:
    """The windows that `measure` reads."""
    most = model.max_model_len
    if context is not None and not 2 <= context <= most:
        raise ConfigError(f"--context: got {context}, allowed: 2 to {most}, the model's own")
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    lead = start_of_sequence(model.tokenizer)
    return cut(token_ids, most if context is None else context, overlap, lead)


def start_of_sequence(tokenizer: Tokenizer) -> list[int]:
    """What a sequence begins with: what the tokenizer puts there, else BOS, else nothing."""
    ids = tokenizer.encode("")
    if ids or tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id]


def stretches(losses: Losses, index_topk: int) -> list[tuple[int, int, np.ndarray]]:
    """(first, last, bool [n]) of tokens by their number of keys, stretches in order.

    Up to `index_topk` keys attention is dense. The last and the first few tokens on either side of
    that border have stretches of their own; behind them each is twice as long as the one before.
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
