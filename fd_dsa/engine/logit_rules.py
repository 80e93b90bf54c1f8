"""What a request does to its logits before a token is drawn: penalties, bias and bans.

The rules of one request live as long as it does, so preemption does not touch them. Applying
them is vectorised over all rows of a step that have any; rows without cost nothing.

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

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_LARGEST = float(np.finfo(np.float32).max)
_NO_IDS = np.empty(0, np.int64)


class BadWords(list[str]):
    """`SamplingParams.bad_words` with their tokens; shared by all outputs of a request.

    The server makes it of what a client sends, so that the engine's thread tokenizes nothing.

    Args:
        sequences: token ids that never come in a row, each not empty.

    Attributes:
        single: int64, tokens that are a sequence alone.
        by_token: the other sequences, by their last token but one.
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
    def of(cls, words: Sequence[str] | None, tokenizer: Tokenizer) -> BadWords | None:
        """The words with their tokens, as at the start of a text and as after a space.

        Returns:
            None without words; `words` itself where it has its tokens.

        Raises:
            ValueError: a word is not valid Unicode.
        """
        if not words:
            return None
        if isinstance(words, BadWords):
            return words
        texts = [*words, *(" " + word.lstrip() for word in words)]
        return cls(words, filter(None, tokenizer.encode_all(texts)))

    def completing(self, output: list[int], begin: int = 0) -> list[int]:
        """Return tokens that would complete a sequence of several in `output[begin:]`."""
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
    """How often each token is in a growing output; tokens of the prompt have a place too.

    Args:
        prompt_token_ids: tokens that are listed from the start, with count 0.
        output_token_ids: the list that grows; `update` reads what is new in it.
    """

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: list[int]) -> None:
        listed = np.unique(np.array(prompt_token_ids, np.int64))
        self._place_of = {token_id: place for place, token_id in enumerate(listed.tolist())}
        self._ids = listed
        self._counts = np.zeros(len(listed), np.float64)
        self._output = output_token_ids
        self._num_read = 0

    def update(self) -> tuple[Int64, Float64]:
        """Token ids, distinct, and how often each is in the output now."""
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
    """The rules of one request.

    Args:
        output_token_ids: its output, a list that grows.
        bad: what bad words forbid.
        end_token_ids: what min_tokens forbids.
        grammar: which tokens may come at all; None = all.
        answer: place where the bans and min_tokens begin; None = with the output.

    Attributes:
        output, grammar: as given.
        penalties: of repetition, frequency and presence.
        bias_ids, bias: tokens whose logits change by a number.
        banned, end_ids, min_tokens: tokens that never come, and those that do not before
            `min_tokens`.
        num_entries: of the tokens that are listed, at most.
        needs_mask: whether the host must know the whole output to say which tokens may come.
        is_empty: whether no rule can ever change a logit.
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
        """Sort the rules by what they need in a step."""
        self.grammar, self._answer = grammar, answer
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
        rules = (self.counts, bias, bad, params.bad_words_token_ids, params.min_tokens, grammar)
        self.is_empty = not any(rules)
        self.num_entries = len(self.bias_ids) + len(self.banned) + len(self.end_ids)
        starts_later = answer is not None and (len(self.banned) or self.min_tokens)
        has_sequences = bad is not None and bool(bad.by_token)
        self.needs_mask = grammar is not None or has_sequences or bool(starts_later)

    def masks(
        self, vocab_size: int, drafts: Sequence[int] = (), has_ended: bool = False
    ) -> list[npt.NDArray[np.int32]] | None:
        """Return which tokens may come next, and after each draft if it stands.

        Args:
            drafts: tokens that may follow the output, negative = none.
            has_ended: whether the output takes no more tokens.

        Returns:
            int32 [1 + len(drafts)][ceil(vocab_size / 32)]; bit i % 32 of value i // 32 is that of
            token i. All may come where nobody takes one: after the end, and after a draft that
            may not come. None if the grammar's masks do not come in time.
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
            # after the grammar, whose mask may show that it is complete
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
        # a form that is complete ends the output, however short it is
        is_complete = grammar is not None and grammar.is_finished
        if is_too_short(len(output), self.min_tokens, answer) and not is_complete:
            banned.append(self.end_ids)
        if self._bad is not None and begin is not None:
            banned.append(np.array(self._bad.completing(output, begin), np.int64))
        return banned[0] if len(banned) == 1 else np.concatenate(banned)


def apply_rules(logits: Float32, rules: Sequence[LogitRules]) -> None:
    """Change logits in place: penalties, then bias, then grammars and bans.

        l = l / r if l > 0 else l * r       tokens of prompt and output, r = repetition_penalty
        l = l - f * count - p * (count > 0)                tokens of the output
        l = l + bias;   l = -inf where banned

    Args:
        logits: float32 [n, vocab_size], no NaN, no +inf.
        rules: of the n rows.
    """
    _apply_penalties(logits, rules)
    rows, ids = _flat([rule.bias_ids for rule in rules])
    if len(ids):
        bias = np.concatenate([rule.bias for rule in rules])
        _store(logits, rows, ids, logits[rows, ids] + bias)
    # one row at a time stays in the processor's cache; copies of all rows would be 100 MB
    for row, rule in enumerate(rules):
        if rule.grammar is not None:
            _apply_grammar(logits[row], rule.grammar)
    # after the masks, which may find that a grammar is complete
    rows, ids = _flat([rule.banned_ids() for rule in rules])
    logits[rows, ids] = -np.inf


def _apply_penalties(logits: Float32, rules: Sequence[LogitRules]) -> None:
    """Repetition, frequency and presence penalty of all rows that have one."""
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
    """Row and token of every entry of one list for each row."""
    rows = np.repeat(np.arange(len(ids)), [len(entry) for entry in ids])
    return rows, np.concatenate(ids)


def _store(logits: Float32, rows: Int64, ids: Int64, values: Float64) -> None:
    """Write values; what is too large for float32 becomes its largest number, not +inf."""
    with np.errstate(over="ignore"):
        logits[rows, ids] = np.minimum(values, _LARGEST)
