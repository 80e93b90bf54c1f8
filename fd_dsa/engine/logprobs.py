"""Log-probabilities of the tokens of prompts and outputs.

They belong to the distribution of the model, before penalties, bias, bans, grammar and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fd_dsa.engine.detokenizer import Detokenizer
from fd_dsa.engine.draws import lower_bound
from fd_dsa.tensor import Float32, Int64

# maximum number of logits scored together, which bounds the temporary arrays
_GROUP_LOGITS = 2**20


class TokenScore(NamedTuple):
    """Log-probability of a token, its rank, and the likeliest tokens at its position.

    Attributes:
        logprob: natural logarithm of its probability; -inf if the model excludes the token.
        rank: rank of the token; 1 = the likeliest one.
        top: the likeliest tokens and their log-probabilities, likeliest first, ties by lower id.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenLogprobs(NamedTuple):
    """A token of a prompt or an output with its score.

    Attributes:
        token_id: id of the token.
        score: its score.
        text_offset: number of characters of the prompt or output before the text of the token.
    """

    token_id: int
    score: TokenScore
    text_offset: int


def score_tokens(
    logits: Float32, token_ids: Int64, num_top: Sequence[int]
) -> list[TokenScore | None]:
    """Score one token in each row.

    Args:
        logits: float32 [num_rows, vocab_size].
        token_ids: int64 [num_rows].
        num_top: number of likeliest tokens to list for each row, >= 0.

    Returns:
        A score for each row; None if its logits have NaN or +inf, or only -inf.
    """
    group_size = max(1, _GROUP_LOGITS // logits.shape[1])
    scores: list[TokenScore | None] = []
    for begin in range(0, len(logits), group_size):
        group = slice(begin, begin + group_size)
        scores += _score_group(logits[group], token_ids[group], num_top[group])
    return scores


def _score_group(
    logits: Float32, token_ids: Int64, num_top: Sequence[int]
) -> list[TokenScore | None]:
    """Score a few rows. Temporary arrays have the size of their logits."""
    largest = logits.max(axis=1)
    usable = np.flatnonzero(np.isfinite(largest))
    scores: list[TokenScore | None] = [None] * len(logits)
    if not len(usable):
        return scores
    if len(usable) < len(logits):
        logits, token_ids, largest = logits[usable], token_ids[usable], largest[usable]
    with np.errstate(over="ignore"):
        weights = np.exp(logits - largest[:, None])
    norm = largest + np.log(weights.sum(axis=1, dtype=np.float64))
    chosen = logits[np.arange(len(logits)), token_ids]
    ranks = (logits > chosen[:, None]).sum(axis=1) + 1
    logprobs = chosen - norm
    counts = [num_top[row] for row in usable.tolist()]
    bounds = lower_bound(logits, max(counts)) if any(counts) else largest
    for i, (row, count) in enumerate(zip(usable.tolist(), counts, strict=True)):
        top: tuple[tuple[int, float], ...] = ()
        if count:
            ids = np.flatnonzero(logits[i] >= bounds[i])
            # a stable sort lists tied tokens by lower id
            ids = ids[np.argsort(-logits[i, ids], kind="stable")[:count]]
            top_logprobs = logits[i, ids].astype(np.float64) - norm[i]
            top = tuple(zip(ids.tolist(), top_logprobs.tolist(), strict=True))
        scores[row] = TokenScore(float(logprobs[i]), int(ranks[i]), top)
    return scores


class OutputLogprobs:
    """Log-probabilities of a growing output, each shown together with the text of its token.

    Entries are held back with their text: half of a character, or a possible stop string. Entries
    of a stop string that is cut off are never shown.

    Attributes:
        shown: entries so far.
    """

    def __init__(self) -> None:
        self.shown: list[TokenLogprobs] = []
        self._held: list[TokenLogprobs] = []
        # end of the text of each held token that has text so far, characters
        self._ends: list[int] = []
        self._num_decoded = 0
        self._num_shown_chars = 0

    def append(self, token_id: int, score: TokenScore, num_chars: int) -> None:
        """Append a token that has added `num_chars` characters of text."""
        self._held.append(TokenLogprobs(token_id, score, self._num_decoded))
        self._num_decoded += num_chars
        if num_chars:
            missing = len(self._held) - len(self._ends)
            self._ends += [self._num_decoded] * missing

    def show(self, num_chars: int, is_finished: bool, is_cut: bool) -> list[TokenLogprobs]:
        """Show the entries of the text that a step has shown, and return them.

        Args:
            num_chars: length of the text, characters.
            is_finished: True if the output has ended.
            is_cut: True if the rest of the text belongs to a stop string.
        """
        self._num_shown_chars += num_chars
        visible = self._num_shown_chars
        if is_cut:
            count = sum(entry.text_offset < visible for entry in self._held)
        elif is_finished:
            count = len(self._held)
        else:
            count = sum(end <= visible for end in self._ends)
        new, self._held = self._held[:count], self._held[count:]
        del self._ends[:count]
        self.shown += new
        return new


class PromptLogprobs:
    """Log-probabilities of a prompt, which is scored chunk by chunk.

    Args:
        token_ids: tokens of the prompt.
        num_top: number of likeliest tokens to list at each position.
        detokenizer: new detokenizer of the prompt, for the text offsets.

    Attributes:
        entries: entries of the scored tokens, with None for the first token.
        is_shown: True if an output of the request has shown all entries.
    """

    def __init__(self, token_ids: list[int], num_top: int, detokenizer: Detokenizer) -> None:
        self.entries: list[TokenLogprobs | None] = [None]
        self.is_shown = False
        self._token_ids = token_ids
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._num_decoded = 0

    @property
    def is_complete(self) -> bool:
        """True if all tokens of the prompt are scored."""
        return len(self.entries) == len(self._token_ids)

    def unscored(self, begin: int, end: int) -> range:
        """Return tokens of [begin, end) whose logits score a next token without a score."""
        return range(max(begin, len(self.entries) - 1), min(end, len(self._token_ids) - 1))

    def append(self, logits: Float32) -> bool:
        """Score the next tokens by the logits of the `unscored` ones.

        Args:
            logits: float32 [num_tokens, vocab_size].

        Returns:
            False if the logits are unusable.
        """
        begin = len(self.entries)
        following = self._token_ids[begin : begin + len(logits)]
        ids = np.array(following, np.int64)
        scores = score_tokens(logits, ids, [self._num_top] * len(ids))
        for position, (token_id, score) in enumerate(zip(following, scores, strict=True), begin):
            if score is None:
                return False
            self._num_decoded += len(self._detokenizer.append(self._token_ids[position - 1]))
            self.entries.append(TokenLogprobs(token_id, score, self._num_decoded))
        return True
