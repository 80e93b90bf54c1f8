"""Prompts beside running streams: chunks follow measured times and a target, tokens do not."""

from __future__ import annotations

from collections.abc import Callable

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
    engine.clock = lambda: sum(map(seconds, engine.runner.steps))
    return engine


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
