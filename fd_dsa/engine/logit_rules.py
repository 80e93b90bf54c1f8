"""Rules that change the logits of a request before sampling: penalties, bias and bans.

Rules live as long as their request, so preemption does not touch them. They are applied to all rows
of a step together, and rows without rules take no time.

Source of the meanings: the documentation of vLLM's SamplingParams and of the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fd_dsa.engine.grammar_matcher import GrammarMatcher
from fd_dsa.engine.reasoning import AnswerStart, is_too_short
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.tensor import Float32, Float64, Int64

_LARGEST = float(np.finfo(np.float32).max)
_NO_IDS = np.empty(0, np.int64)


class BadWords(list[str]):
    """`SamplingParams.bad_words` with their tokens, shared by all outputs of a request.

    The server makes them before a request reaches the engine's thread, which then tokenizes less.

    Args:
        words: the texts.
        sequences: non-empty sequences of token ids, none of which an output may contain.

    Attributes:
        single: int64 [n]; tokens of the sequences with one token.
        by_token: the longer sequences, by their last token but one.
    """

    def __init__(self, words: Iterable[str], sequences: Iterable[Sequence[int]]) -> None:
        super().__init__(words)
        distinct = {tuple(sequence) for sequence in sequences}
        self.single = np.array([s[0] for s in distinct if len(s) == 1], np.int64)
        self.by_token: dict[int, list[tuple[int, ...]]] = {}
        for sequence in distinct:
            if len(sequence) > 1:
                self.by_token.setdefault(sequence[-2], []).append(sequence)

    @classmethod
    def of(cls, words: Sequence[str], tokenizer: Tokenizer) -> BadWords:
        """Return words with their tokens, as at the start of a text and as after a space.

        Words that have their tokens already are returned as they are.

        Raises:
            ValueError: a word is not valid Unicode.
        """
        if isinstance(words, BadWords):
            return words
        texts = [*words, *(" " + word.lstrip() for word in words)]
        return cls(words, filter(None, tokenizer.encode_all(texts)))

    def completing(self, output: list[int], begin: int = 0) -> list[int]:
        """Return tokens that would complete a longer sequence at the end of `output[begin:]`."""
        num_tokens = len(output) - begin
        if num_tokens <= 0:
            return []
        return [
            sequence[-1]
            for sequence in self.by_token.get(output[-1], ())
            if len(sequence) <= num_tokens + 1
            and tuple(output[1 - len(sequence) :]) == sequence[:-1]
        ]


class TokenCounts:
    """Number of occurrences of each token in a growing output.

    Args:
        prompt_token_ids: tokens that are listed from the start, with count 0.
        output_token_ids: the growing list, whose new tokens `update` reads.
    """

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: list[int]) -> None:
        listed = np.unique(np.array(prompt_token_ids, np.int64))
        self._place_of = {token_id: place for place, token_id in enumerate(listed.tolist())}
        self._ids = listed
        self._counts = np.zeros(len(listed), np.float64)
        self._output = output_token_ids
        self._num_read = 0

    def update(self) -> tuple[Int64, Float64]:
        """Read new tokens of the output.

        Returns:
            Distinct token ids, and the number of occurrences of each in the output.
        """
        for token_id in self._output[self._num_read :]:
            place = self._place_of.setdefault(token_id, len(self._place_of))
            if place >= len(self._ids):
                more = max(len(self._ids), 64)
                self._ids, self._counts = (
                    np.pad(self._ids, (0, more)),
                    np.pad(self._counts, (0, more)),
                )
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_read = len(self._output)
        num_listed = len(self._place_of)
        return self._ids[:num_listed], self._counts[:num_listed]


class LogitRules:
    """Rules of one request, see `SamplingParams.has_rules`.

    Args:
        params: parameters of the request.
        prompt_token_ids: tokens of the prompt.
        output_token_ids: growing list with the tokens of the output.
        bad: bad words with their tokens.
        end_token_ids: tokens that `min_tokens` excludes.
        grammar: position in the grammar of the output; None = all tokens are allowed.
        answer: beginning of the answer, from which on bans and min_tokens apply; None = the output.

    Attributes:
        output, grammar: as given.
        penalties: repetition, frequency and presence penalty.
        counts: occurrences of the penalized tokens, or None without a penalty.
        bias_ids, bias: int64 and float64 [n]; tokens, and numbers that are added to their logits.
        banned: int64 [n]; tokens that are never allowed.
        end_ids, min_tokens: int64 [n]; tokens that are not allowed before `min_tokens` tokens.
        num_entries: maximum number of biased or banned tokens.
        needs_mask: True if the allowed tokens depend on the whole output, so that only the host can
            tell them.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: list[int],
        bad: BadWords | None = None,
        end_token_ids: Iterable[int] = (),
        grammar: GrammarMatcher | None = None,
        answer: AnswerStart | None = None,
    ) -> None:
        self.grammar = grammar
        self.penalties = (
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self.counts: TokenCounts | None = None
        if self.penalties != (1, 0, 0):
            listed = prompt_token_ids if params.repetition_penalty != 1 else ()
            self.counts = TokenCounts(listed, output_token_ids)
        bias = params.logit_bias or {}
        self.bias_ids = np.array(list(bias), np.int64)
        self.bias = np.array(list(bias.values()), np.float64)
        self._bad = bad
        single = () if bad is None else bad.single
        self.banned = np.array([*single, *(params.bad_words_token_ids or ())], np.int64)
        self.output = output_token_ids
        self.min_tokens = params.min_tokens
        self.end_ids = np.array(sorted(end_token_ids), np.int64)
        self.num_entries = len(self.bias_ids) + len(self.banned) + len(self.end_ids)
        starts_later = answer is not None and (len(self.banned) or self.min_tokens)
        has_sequences = bad is not None and bool(bad.by_token)
        self.needs_mask = grammar is not None or has_sequences or bool(starts_later)
        self._answer = answer if starts_later or has_sequences else None

    def masks(
        self, vocab_size: int, drafts: Sequence[int] = (), has_ended: bool = False
    ) -> list[npt.NDArray[np.int32]] | None:
        """Return masks of the tokens that are allowed next, and after each accepted draft.

        Args:
            vocab_size: number of tokens.
            drafts: tokens that may follow the output, negative = unknown.
            has_ended: True if the output gets no more tokens.

        Returns:
            int32 [1 + len(drafts)][ceil(vocab_size / 32)]; bit i % 32 of value i // 32 belongs to
            token i. Masks that are not used allow all tokens: those after the end, and those after
            a draft that is not allowed. None if a mask of the grammar is late.
        """
        free = np.full(-(-vocab_size // 32), -1, np.int32)
        masks: list[npt.NDArray[np.int32]] = []
        grammar, output, answer = self.grammar, self.output, self._answer
        for draft in () if has_ended else (*drafts, -1):
            mask = free.copy()
            if grammar is not None:
                if not grammar.await_mask():
                    return None
                grammar.fill_bitmask(mask)
            # after the grammar, because its mask may show that it is complete
            ids = self._banned_ids(output, grammar, answer)
            bits = ~(np.uint32(1) << (ids % 32).astype(np.uint32))
            np.bitwise_and.at(mask.view(np.uint32), ids // 32, bits)
            masks.append(mask)
            if draft < 0 or not mask[draft // 32] >> draft % 32 & 1 or draft in self.end_ids:
                break
            output = [*output, draft]
            if answer is not None and not answer.is_found:
                answer = answer.copy() if answer is self._answer else answer
                answer.append_draft(draft, len(output))
            if grammar is not None:
                grammar = grammar.copy() if grammar is self.grammar else grammar
                if grammar.accept(draft):
                    break
        return masks + [free] * (1 + len(drafts) - len(masks))

    def banned_ids(self) -> Int64:
        """Return the tokens that may not follow the output."""
        return self._banned_ids(self.output, self.grammar, self._answer)

    def _banned_ids(
        self, output: list[int], grammar: GrammarMatcher | None, answer: AnswerStart | None
    ) -> Int64:
        """Return the tokens that may not follow an output with its grammar and answer so far."""
        begin = 0 if answer is None else answer.index
        banned = [_NO_IDS if begin is None else self.banned]
        # a complete grammar ends the output, even if it is too short
        is_complete = grammar is not None and grammar.is_finished
        if is_too_short(len(output), self.min_tokens, answer) and not is_complete:
            banned.append(self.end_ids)
        if self._bad is not None and begin is not None:
            banned.append(np.array(self._bad.completing(output, begin), np.int64))
        return banned[0] if len(banned) == 1 else np.concatenate(banned)


def apply_rules(logits: Float32, rules: Sequence[LogitRules]) -> None:
    """Change logits in place: penalties, then bias, then grammars and bans.

    - Repetition penalty r, for tokens of prompt and output: `l / r if l > 0 else l * r`.
    - Frequency and presence penalty, for tokens of the output: `l - f * count - p * (count > 0)`.
    - Bias: `l + bias`. Banned tokens: `-inf`.

    Args:
        logits: float32 [num_rows, vocab_size], without NaN and +inf.
        rules: rules of each row.
    """
    _apply_penalties(logits, rules)
    rows, ids = _flat([rule.bias_ids for rule in rules])
    if len(ids):
        bias = np.concatenate([rule.bias for rule in rules])
        _store(logits, rows, ids, logits[rows, ids] + bias)
    # one row at a time fits in the processor's cache; copies of all rows would take 100 MB
    for row, rule in enumerate(rules):
        if rule.grammar is not None:
            _apply_grammar(logits[row], rule.grammar)
    # after the masks, because a mask may show that its grammar is complete
    rows, ids = _flat([rule.banned_ids() for rule in rules])
    logits[rows, ids] = -np.inf


def _apply_penalties(logits: Float32, rules: Sequence[LogitRules]) -> None:
    """Apply repetition, frequency and presence penalties of all rows that have some."""
    listed = [(_NO_IDS, _NO_IDS) if r.counts is None else r.counts.update() for r in rules]
    rows, ids = _flat([ids for ids, _ in listed])
    if not len(ids):
        return
    counts = np.concatenate([count for _, count in listed])
    repetition, frequency, presence = np.array([r.penalties for r in rules])[rows].T
    values = logits[rows, ids].astype(np.float64)
    with np.errstate(over="ignore"):
        values = np.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    _store(logits, rows, ids, values)


def _apply_grammar(logits: Float32, grammar: GrammarMatcher) -> None:
    """Write -inf for every token that a grammar does not allow.

    Args:
        logits: float32 [vocab_size].
    """
    bitmask = np.zeros(-(-len(logits) // 32), np.int32)
    grammar.fill_bitmask(bitmask)
    bits = np.unpackbits(bitmask.view(np.uint8), count=len(logits), bitorder="little")
    np.copyto(logits, np.float32(-np.inf), where=bits == 0)


def _flat(ids: list[Int64]) -> tuple[Int64, Int64]:
    """Return row and token of every entry, from one list for each row."""
    rows = np.repeat(np.arange(len(ids)), [len(entry) for entry in ids])
    return rows, np.concatenate(ids)


def _store(logits: Float32, rows: Int64, ids: Int64, values: Float64) -> None:
    """Write values. A value above the largest float32 becomes that number instead of +inf."""
    with np.errstate(over="ignore"):
        logits[rows, ids] = np.minimum(values, _LARGEST)
