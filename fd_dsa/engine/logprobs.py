"""Log-probabilities of tokens, and when those of an output may be shown.

They are of the model's own distribution: before penalties, bias, bans, grammar and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.detokenizer import Detokenizer
from fd_dsa.engine.draws import lower_bound

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

# rows are taken in groups of so many logits, which bounds the temporaries
_GROUP_LOGITS = 2**20


class TokenScore(NamedTuple):
    """What the model thought of one token.

    Attributes:
        logprob: natural logarithm of its probability; -inf where the model excludes it.
        rank: 1 for the likeliest token.
        top: the likeliest tokens and their logarithms, in that order, ties to the lower id.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenLogprobs(NamedTuple):
    """A token of a prompt or an output with its score.

    Attributes:
        token_id: the token.
        score: what the model thought of it.
        text_offset: characters of the prompt's or the output's text in front of the token's own.
    """

    token_id: int
    score: TokenScore
    text_offset: int


def score_tokens(
    logits: Float32, token_ids: Int64, num_top: Sequence[int]
) -> list[TokenScore | None]:
    """Scores of one token in each row.

    Args:
        logits: float32 [n, vocab_size].
        token_ids: int64 [n].
        num_top: how many of the likeliest tokens each row is to have, >= 0.

    Returns:
        One score for each row, None where the logits hold NaN or +inf, or only -inf.
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
    """Scores of so few rows that temporaries of their size do not matter."""
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
            # stable, so that ties go to the lower id
            ids = ids[np.argsort(-logits[i, ids], kind="stable")[:count]]
            top_logprobs = logits[i, ids].astype(np.float64) - norm[i]
            top = tuple(zip(ids.tolist(), top_logprobs.tolist(), strict=True))
        scores[row] = TokenScore(float(logprobs[i]), int(ranks[i]), top)
    return scores


class OutputLogprobs:
    """Log-probabilities of a growing output; each is shown with the text that its token ends.

    While text is held back (half a character, what may become a stop string), so are they; those
    of a stop string that is cut off are never shown.
    """

    def __init__(self) -> None:
        self.shown: list[TokenLogprobs] = []
        self._held: list[TokenLogprobs] = []
        # ends, in characters, of the text of the first held tokens; the others have none yet
        self._ends: list[int] = []
        self._num_decoded = 0
        self._num_shown_chars = 0

    def append(self, token_id: int, score: TokenScore, num_chars: int) -> None:
        """Take a token which has brought so many characters of text."""
        self._held.append(TokenLogprobs(token_id, score, self._num_decoded))
        self._num_decoded += num_chars
        if num_chars:
            missing = len(self._held) - len(self._ends)
            self._ends += [self._num_decoded] * missing

    def show(self, num_chars: int, is_finished: bool, is_cut: bool) -> list[TokenLogprobs]:
        """What may be shown now that so many more characters are.

        Args:
            num_chars: of the text shown by this step.
            is_finished: nothing comes any more.
            is_cut: what is not shown of the text belongs to a stop string.
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
    """Log-probabilities of a prompt, read chunk by chunk; the first token has none.

    Args:
        num_top: likeliest tokens at each position.
        detokenizer: for the offsets; used by nobody else, and at the start of the prompt.
    """

    def __init__(self, token_ids: list[int], num_top: int, detokenizer: Detokenizer) -> None:
        """The entry of the first token is there from the start."""
        self.entries: list[TokenLogprobs | None] = [None]
        self._token_ids = token_ids
        self._num_top = num_top
        self._detokenizer = detokenizer
        self._num_decoded = 0

    @property
    def is_complete(self) -> bool:
        """True when all tokens of the prompt are scored."""
        return len(self.entries) == len(self._token_ids)

    def unread(self, begin: int, end: int) -> range:
        """Tokens of [begin, end) whose logits are needed; each scores the next token."""
        return range(max(begin, len(self.entries) - 1), min(end, len(self._token_ids) - 1))

    def read(self, logits: Float32) -> bool:
        """Take the logits of the `unread` tokens, float32 [n, vocab_size]; False: not finite."""
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
