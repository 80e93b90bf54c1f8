"""Stop strings, min_tokens and bad words begin with the answer, wherever tokens are sampled."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.detokenizer import new_detokenizer
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.reasoning import AnswerStart, Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs
from tests.engine import tokenizer_kinds
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import EOS, VOCAB_SIZE, FakeRunner, byte_tokenizer, make_engine, run_all
from tests.engine.test_async_scheduling import GreedyRunner

PROMPT = [7, 8, 9]
LETTERS = "abcdef"
MAX_TOKENS = 24
# each letter is a token, so places in the text are places in the output
IDS = {letter: byte_tokenizer().encode(letter, add_special_tokens=False)[0] for letter in LETTERS}
NAMES = {token: letter for letter, token in IDS.items()}
Answer = tuple[list[int], str, str]


def answer_begin(text: str, reasoning: Reasoning) -> int | None:
    """Offset of the answer in a text, None inside of the reasoning."""
    rest = text.lstrip()
    if reasoning.begin and (len(text) - len(rest) > 64 or not rest.startswith(reasoning.begin)):
        return 0
    rest = rest.removeprefix(reasoning.begin) if reasoning.begin else text
    before, end, _ = rest.partition(reasoning.end)
    return len(text) - len(rest) + len(before + end) if end else None


def expected(params: SamplingParams) -> Answer:
    """Tokens, text and reason of a greedy output by the plain rules."""
    reasoning, runner = params.reasoning or Reasoning("a"), FakeRunner(InputBatch(1, 1, 1, 1), 1)
    output, text = list[int](), ""
    while len(output) < MAX_TOKENS:
        logits = runner.logits_after([*PROMPT, *output]).astype(float)
        for token, value in (params.logit_bias or {}).items():
            logits[token] += value
        begin = answer_begin(text, reasoning)
        if params.min_tokens and (begin is None or len(output) - begin < params.min_tokens):
            logits[EOS] = -1e9
        for word in (params.bad_words or ()) if begin is not None else ():
            if text[begin:].endswith(word[:-1]):
                logits[IDS[word[-1]]] = -1e9
        output.append(int(logits.argmax()))
        if output[-1] == EOS:
            return output, text, "stop"
        text += NAMES[output[-1]]
        begin = answer_begin(text, reasoning)
        for stop in params.stop_strings if begin is not None else ():
            if text[begin + params.min_tokens :].endswith(stop):
                return output, text[: -len(stop)], "stop"
    return output, text, "length"


@cache
def cases() -> list[tuple[SamplingParams, Answer]]:
    """Random rules over the likely letters, and their outputs."""
    draw, found = random.Random(3), []
    for _ in range(80):
        params = SamplingParams(
            reasoning=Reasoning(
                draw.choice(["", "", "a", "bc"]), draw.choice(["c", "ab", "d", "fed"])
            ),
            temperature=0,
            max_tokens=MAX_TOKENS,
            min_tokens=draw.choice([0, 0, 1, 2, 5]),
            stop=draw.choice([None, ["a"], ["b", "ef"], ["ca"]]),
            bad_words=draw.choice([None, ["a"], ["bc", "e"], ["cd"]]),
            logit_bias={
                **{token: 6 + draw.random() for token in IDS.values()},
                EOS: draw.choice([2.0, 6.0]),
            },
        )
        found.append((params, expected(params)))
    return found


def found_by(engine: LLMEngine) -> list[Answer]:
    """Outputs of all cases, in batches."""
    for number, (params, _) in enumerate(cases()):
        engine.add_request(str(number), PROMPT, params)
    ends = {name: outputs[-1] for name, outputs in run_all(engine).items()}
    ordered = [ends[str(number)] for number in range(len(cases()))]
    for (params, _), end in zip(cases(), ordered, strict=True):
        written = "".join(NAMES.get(token, "") for token in end.token_ids)
        assert end.answer_start == answer_begin(written, params.reasoning or Reasoning())
    return [(end.token_ids, end.text, str(end.finish_reason)) for end in ordered]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_outputs_follow_the_plain_rules(most: int) -> None:
    answers = {(str(number), 0): answer[0] for number, (_, answer) in enumerate(cases())}
    drafter = KnowingDrafter(answers, 0.8, VOCAB_SIZE)
    spec_decoder = SpecDecoder(drafter, most) if most else None
    assert found_by(make_engine(spec_decoder=spec_decoder)) == [answer for _, answer in cases()]


class RuledRunner(GreedyRunner):
    """Changes logits by the parameters of a batch row, as the kernels of a device do."""

    def __init__(self) -> None:
        super().__init__(InputBatch(4, 128, 16, 4), 256, VOCAB_SIZE)
        self._given: dict[int, RowParameters] = {}

    def set_parameters(self, batch_row: int, given: RowParameters, *_: Any) -> None:
        self._given[batch_row] = given

    def enqueue_model(self, logits_indices: np.ndarray, sampling: SamplingInputs) -> None:
        super().enqueue_model(logits_indices, sampling)
        places = sampling.batch_rows, sampling.positions
        for row, batch_row, position in zip(self._unsampled[0], *places, strict=True):
            given = self._given[batch_row]
            for token, bias in given.bias.items():
                row[token] += bias
            row[[*given.banned, *(given.end_ids if position < given.min_tokens else ())]] = -np.inf


def device_engine() -> LLMEngine:
    """An engine whose tokens are sampled on a device."""
    return LLMEngine(
        RuledRunner(), byte_tokenizer(), num_blocks=256, max_model_len=64, eos_token_ids=[EOS]
    )


def test_tokens_of_a_device_follow_the_plain_rules() -> None:
    """Steps are queued before the tokens that end the reasoning are known."""
    engine = device_engine()
    assert found_by(engine) == [answer for _, answer in cases()]
    assert engine.stats().num_mask_waits


def test_only_rules_that_wait_for_the_answer_need_masks() -> None:
    engine = device_engine()
    params = SamplingParams(temperature=0, stop=["zzz"], max_tokens=8, reasoning=Reasoning())
    engine.add_request("stops", PROMPT, params)
    engine.add_request("counts", PROMPT, replace(params, stop=None, reasoning=None, min_tokens=3))
    run_all(engine)
    assert engine.stats().num_mask_waits == 0


MARKERS = {
    "own": Reasoning("<think>"),
    "opened": Reasoning(),
    "other": Reasoning("", "\n<call>"),
}
TEXTS = [
    "I think.\nSTOP</think>\n\nÄnswer STOP",
    "STOP</think>STOP</think>",
    " \n<think>STOP é</think> yes",
    " " * 70 + "<think>no</think> yes",
    "<thin air</think",
    "<think>never ends </thin",
    "\n <",
    "x\n<call>y</think>z",
    "fox</think><mask><r>  漢字 fox",
]


@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("kind", ["demo", "deepseek", "gpt2", "llama"])
def test_the_answer_begins_at_a_text_of_any_tokens(kind: str, name: str) -> None:
    """For markers that are cut into tokens in any way, or are one token with other text."""
    tokenizer, reasoning = Tokenizer(tokenizer_kinds.KINDS[kind]()), MARKERS[name]
    for text in TEXTS:
        detokenizer = new_detokenizer(tokenizer)
        start, whole, answer = AnswerStart(reasoning, detokenizer), "", ""
        ahead, is_found = start.copy(), False
        for number, token in enumerate(tokenizer.encode(text, add_special_tokens=False), 1):
            ahead.append_draft(token, number)
            piece = detokenizer.append(token)
            whole += piece
            answer += start.append(piece, number)[1]
            assert (ahead.index, ahead.is_found) == (start.index, start.is_found)
            begin = answer_begin(whole, reasoning)
            assert (start.index is None) == (begin is None)
            if start.is_found and not is_found:
                is_found = True
                assert start.index in (0, number)
        piece = detokenizer.flush()
        answer += start.append(piece, number)[1] + start.flush()
        whole += piece
        begin = answer_begin(whole, reasoning)
        assert answer == ("" if begin is None else whole[begin:].lstrip() if begin else whole)
