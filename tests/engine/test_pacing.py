"""Prompts beside running streams: chunks follow measured times and a target, tokens do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from tests.engine.fakes import make_engine, run_all

TARGET_S = 0.1
# tokens, cached tokens and whether it is a prompt, by row; as FakeRunner keeps them
Step = dict[int, tuple[int, int, bool]]


def greedy(max_tokens: int) -> SamplingParams:
    """Parameters that do not end early."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def seconds_of(step: Step) -> float:
    """Time of a step: a fixed cost, each token, and each key of a prompt's tokens."""
    pairs = sum(tokens * cached for tokens, cached, is_prompt in step.values() if is_prompt)
    return 0.01 + 0.0005 * sum(tokens for tokens, _, _ in step.values()) + 5e-7 * pairs


def timed_engine(
    seconds: Callable[[Step], float] = seconds_of, target_gap_s: float = TARGET_S
) -> LLMEngine:
    """An engine whose clock stands still but for the steps of its runner."""
    engine = make_engine(
        num_blocks=200,
        block_size=16,
        max_model_len=1600,
        max_num_batched_tokens=512,
        target_gap_s=target_gap_s,
    )
    engine.clock = StepClock(engine, seconds)
    return engine


class StepClock:
    """Clock of an engine that its steps alone advance.

    Attributes:
        now: time after the steps so far, seconds.
    """

    def __init__(self, engine: LLMEngine, seconds: Callable[[Step], float]) -> None:
        self._engine, self._seconds, self._num_timed, self.now = engine, seconds, 0, 0.0

    def __call__(self) -> float:
        """Return the time, with the steps since the last call."""
        steps = self._engine.runner.steps
        for step in steps[self._num_timed :]:
            self.now += self._seconds(step)
        self._num_timed = len(steps)
        return self.now


def prompt_tokens(step: Step) -> int:
    """Tokens of prompts in a step."""
    return sum(tokens for tokens, _, is_prompt in step.values() if is_prompt)


def start_stream(engine: LLMEngine) -> int:
    """Let a stream get some tokens; returns how many steps have run."""
    engine.add_request("stream", [2, 3, 4], greedy(400))
    for _ in range(5):
        engine.step()
    return len(engine.runner.steps)


def steps_of(engine: LLMEngine) -> list[Step]:
    """Steps of a prompt of 1,500 tokens beside a stream that runs already, until both end."""
    begin = start_stream(engine)
    engine.add_request("prompt", [5, 6, 7] * 500, greedy(2))
    run_all(engine)
    return engine.runner.steps[begin:]


def test_every_gap_of_a_stream_keeps_the_target_while_a_prompt_is_computed() -> None:
    steps = [step for step in steps_of(timed_engine()) if prompt_tokens(step)]
    assert len(steps) > 10 and all(0 in step for step in steps)
    assert max(map(seconds_of, steps)) <= TARGET_S
    # as much as fits, not as little as is safe
    assert sum(map(prompt_tokens, steps)) / len(steps) > 48


@pytest.mark.parametrize("seed", range(2))
def test_the_p99_of_gaps_keeps_the_target_under_random_arrivals(seed: int) -> None:
    rng, engine = np.random.default_rng(seed), timed_engine()

    def noisy(step: Step) -> float:
        """A time that varies by a twentieth."""
        return seconds_of(step) * rng.uniform(0.95, 1.05)

    clock = engine.clock = StepClock(engine, noisy)
    arrivals = np.cumsum(rng.exponential(0.5, 60)).tolist()
    # time of the newest token of each request
    newest: dict[str, float] = {}
    gaps, num_mixed = [], 0
    while arrivals or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            clock.now = max(clock.now, arrivals[0])
        while arrivals and arrivals[0] <= clock.now:
            prompt = rng.integers(2, 40, int(rng.integers(20, 900))).tolist()
            engine.add_request(str(arrivals.pop(0)), prompt, greedy(int(rng.integers(2, 60))))
        outputs = engine.step()
        kinds = {is_prompt for _, _, is_prompt in engine.runner.steps[-1].values()}
        num_mixed += len(kinds) == 2
        for output in outputs:
            if before := newest.get(output.request_id):
                gaps.append(clock() - before)
            newest[output.request_id] = clock()
    assert num_mixed > 50 and len(gaps) > 1000
    assert np.percentile(gaps, 99) <= TARGET_S


def test_without_a_target_a_step_takes_all_that_fits() -> None:
    steps = steps_of(timed_engine(target_gap_s=0))
    assert [prompt_tokens(step) for step in steps][:4] == [511, 511, 478, 0]


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 1e3])
def test_prompts_alone_take_all_that_fits_however_long_it_takes(seconds: float) -> None:
    engine = timed_engine(lambda _: seconds)
    for name in "ab":
        engine.add_request(name, [ord(name) - 90] * 601, greedy(1))
    while engine.has_unfinished_requests():
        engine.step()
    assert [prompt_tokens(step) for step in engine.runner.steps] == [512, 512, 178]


def test_a_target_that_no_step_keeps_stops_no_prompt() -> None:
    steps = steps_of(timed_engine(target_gap_s=1e-3))
    chunks = [prompt_tokens(step) for step in steps if prompt_tokens(step)]
    assert max(chunks) <= 64 and sum(chunks) == 1500


def test_several_prompts_share_what_a_step_has_room_for() -> None:
    engine = timed_engine()
    begin = start_stream(engine)
    for name in "abc":
        engine.add_request(name, [ord(name) - 90] * 100, greedy(2))
    run_all(engine)
    steps = [step for step in engine.runner.steps[begin:] if prompt_tokens(step)]
    assert sum(map(prompt_tokens, steps)) == 300
    assert max(map(seconds_of, steps)) <= TARGET_S
    assert any(sum(is_prompt for _, _, is_prompt in step.values()) > 1 for step in steps)


def test_a_prompt_after_many_cached_tokens_shares_no_step_that_it_would_make_late() -> None:
    """Each of its tokens takes as long as eight tokens at the beginning of a prompt."""

    def seconds(step: Step) -> float:
        pairs = sum(tokens * cached for tokens, cached, is_prompt in step.values() if is_prompt)
        return seconds_of(step) + 2e-6 * pairs

    engine = timed_engine(seconds)
    start_stream(engine)
    shared = [5, 6, 7, 8] * 350
    for name in ("first", "second"):
        engine.add_request(name, shared, greedy(2))
        while len(engine.step()) != 1 or engine.scheduler.num_running != 1:
            pass
    begin = len(engine.runner.steps)
    engine.add_request("short", [9] * 122, greedy(2))
    engine.add_request("long", shared + [9] * 60, greedy(2))
    run_all(engine)
    steps = [step for step in engine.runner.steps[begin:] if prompt_tokens(step)]
    assert sum(map(prompt_tokens, steps)) == 122 + 68
    assert max(map(seconds, steps)) <= TARGET_S


def test_tokens_do_not_depend_on_the_target() -> None:
    answers = []
    for target_gap_s in (0.0, TARGET_S, 1e-3):
        engine = timed_engine(target_gap_s=target_gap_s)
        start_stream(engine)
        engine.add_request("prompt", [5, 6, 7] * 500, greedy(20))
        outputs = run_all(engine)
        answers.append([outputs[name][-1].token_ids for name in ("stream", "prompt")])
        assert engine.stats().num_used_blocks == 0
    assert answers[0] == answers[1] == answers[2]
