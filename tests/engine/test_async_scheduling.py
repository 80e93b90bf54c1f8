"""A step is queued before the tokens of the one before are taken; that nothing else changes is
shown by `tests.soak.histories`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.runner.input_batch import InputBatch, SamplingInputs
from fd_dsa.runner.protocol import RunnerInfo, StepFuture
from tests.engine.fakes import (
    EOS,
    VOCAB_SIZE,
    FakeRunner,
    byte_tokenizer,
    expected_greedy,
    make_engine,
    run_all,
)
from tests.engine.test_engine import find_eos_prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class GreedyRunner(FakeRunner):
    """Takes the largest logit itself. `log` has "run", "sample" and "wait" for a step."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.log: list[str] = []
        self.info = RunnerInfo(sampling=self)
        self._drawn = np.zeros(0, np.int64)

    def set_parameters(self, *parameters: Any) -> None:
        """All batch rows are greedy."""

    def execute_model(self, logits_indices: np.ndarray) -> np.ndarray:
        batch = self.input_batch
        deferred = np.flatnonzero(batch.pending[: batch.num_tokens] >= 0)
        batch.token_ids[deferred] = self._drawn[batch.pending[deferred]]
        self.log.append("run")
        return super().execute_model(logits_indices)

    def enqueue_model(self, logits_indices: np.ndarray, sampling: SamplingInputs) -> None:
        self._unsampled = self.execute_model(logits_indices), sampling

    def sample(self, masks: Sequence[np.ndarray] = ()) -> StepFuture:
        self.log.append("sample")
        logits, sampling = self._unsampled
        masked = [row for row, index in enumerate(sampling.mask_rows) if index >= 0]
        for row, mask in zip(masked, masks, strict=True):
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
            logits[row, allowed[: self.vocab_size] == 0] = -np.inf
        self._drawn = logits.argmax(axis=1)
        return LoggedTokens(self._drawn, self.log)


class LoggedTokens:
    """Tokens of a step, whose wait is logged."""

    def __init__(self, tokens: np.ndarray, log: list[str]) -> None:
        self._tokens, self._log = tokens, log

    def result(self) -> np.ndarray:
        self._log.append("wait")
        return self._tokens


def new_engine(async_scheduling: bool = True, rows: int = 4) -> tuple[LLMEngine, GreedyRunner]:
    runner = GreedyRunner(InputBatch(rows, 128, 16, 4), 256, VOCAB_SIZE)
    engine = LLMEngine(
        runner,
        byte_tokenizer(),
        num_blocks=256,
        max_model_len=64,
        eos_token_ids=[EOS],
        async_scheduling=async_scheduling,
    )
    return engine, runner


def tokens_of(engine: LLMEngine) -> dict[str, list[int]]:
    return {name: outputs[-1].token_ids for name, outputs in run_all(engine).items()}


@pytest.mark.parametrize("rows", [4, 40])
def test_the_next_step_runs_before_tokens_are_taken(rows: int) -> None:
    """For few rows, which are added one by one, and for many; none has a surplus step."""
    engine, runner = new_engine(rows=rows)
    prompts = {str(i): [2 + i, 3] for i in range(rows // 2)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    found = tokens_of(engine)
    assert found == {name: expected_greedy(prompt, 12, None) for name, prompt in prompts.items()}
    assert runner.log == ["run", "sample", *["run", "sample", "wait"] * 11, "wait"]
    assert engine.stats().num_mask_waits == 0


@pytest.mark.parametrize(
    "form", [{"structured_outputs": StructuredOutputsParams(regex="[a-d]{10}Z?")},
             {"bad_words": ["Ju"]}]
)  # fmt: skip
def test_masks_are_made_while_the_queued_step_runs(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a plain request; the bad word is what would come first, of two tokens."""
    # on a busy machine masks may be late
    for module in ("grammar", "grammar_process"):
        monkeypatch.setattr(f"fd_dsa.engine.{module}._PATIENCE_S", 60.0)
    params = SamplingParams(temperature=0, max_tokens=11, **form)
    plain = {"r": [5, 6], "p": [7, 8]}
    found = []
    for is_async in (True, False):
        engine, runner = new_engine(is_async)
        engine.add_request("r", plain["r"], params)
        engine.add_request("p", plain["p"], replace(GREEDY, max_tokens=11))
        found.append(tokens_of(engine))
        num_steps = len(found[0]["r"])
        if is_async:
            # the forward of a step, then the tokens of the one before, then the sampling
            log = ["run", "sample", *["run", "wait", "sample"] * (num_steps - 1)]
            assert runner.log[: len(log)] == log
            assert engine.stats().num_mask_waits == num_steps - 1
    cpu = make_engine(num_blocks=256, block_size=4)
    cpu.add_request("r", plain["r"], params)
    assert found[0] == found[1]
    assert found[0]["r"] == tokens_of(cpu)["r"] != expected_greedy(plain["r"], 11)
    assert found[0]["p"] == expected_greedy(plain["p"], 11, None)


def test_without_it_each_step_is_taken_first() -> None:
    engine, runner = new_engine(async_scheduling=False)
    engine.add_request("r", [2, 3], GREEDY)
    assert tokens_of(engine)["r"] == expected_greedy([2, 3], 12, None)
    assert runner.log == ["run", "sample", "wait"] * 12


def test_the_token_after_an_end_is_dropped() -> None:
    """Its row is free at once, and what it computed is found by nobody."""
    engine, runner = new_engine(rows=1)
    prompt, expected = find_eos_prompt()
    engine.add_request("ends", prompt, SamplingParams(temperature=0, max_tokens=50))
    engine.add_request("next", prompt, GREEDY)
    found = tokens_of(engine)
    assert found == {"ends": expected, "next": expected_greedy(prompt, 12, None)}
    # one step too many for the first, none for the second
    assert len(runner.steps) == len(expected) + 1 + 12
    assert engine.stats().num_used_blocks == 0


def test_steps_of_which_the_host_needs_logits() -> None:
    """A request with log-probabilities beside a plain one, which starts before, ends after it."""
    engine, runner = new_engine()
    engine.add_request("plain", [5, 6], GREEDY)
    for _ in range(3):
        engine.step()
    scored = SamplingParams(temperature=0, max_tokens=4, logprobs=2, ignore_eos=True)
    engine.add_request("scored", [7, 8], scored)
    outputs = run_all(engine)
    assert outputs["plain"][-1].token_ids == expected_greedy([5, 6], 12, None)
    assert outputs["scored"][-1].token_ids == expected_greedy([7, 8], 4, None)
    assert len(outputs["scored"][-1].logprobs) == 4
    assert runner.log.count("wait") == 12 - 4


def test_an_aborted_request_leaves_nothing() -> None:
    engine, _ = new_engine()
    engine.add_request("r", [2, 3], GREEDY)
    for _ in range(3):
        engine.step()
    assert [output.finish_reason for output in engine.abort_request("r")] == ["abort"]
    assert not engine.has_unfinished_requests() and engine.step() == []
    engine.add_request("r", [4, 5], GREEDY)
    assert tokens_of(engine)["r"] == expected_greedy([4, 5], 12, None)
