"""Requests that arrive while others run: a simulation of a device whose host limits its steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.step_times import StepTable
from tests.engine.fakes import FakeRunner, make_engine

SIZES, TOPK, BUDGET, MAX_LEN = (32, 64, 128, 256, 512), 256, 512, 512
# a step with prompts takes as long as the host needs for its launches, whatever it holds
HOST_S, DECODE_S = 0.107, 0.020


class Device:
    """An engine over a runner whose steps take simulated time.

    Args:
        table: times of steps that the engine knows; None = it learns them.
        target_s: target inter-token latency.
    """

    def __init__(self, table: StepTable | None, target_s: float) -> None:
        self.now = 0.0
        self.engine = make_engine(
            num_blocks=600,
            block_size=16,
            max_model_len=MAX_LEN,
            max_num_seqs=32,
            max_num_batched_tokens=BUDGET,
            target_gap_s=target_s,
            enable_prefix_caching=False,
            step_table=table,
        )
        self.engine.clock = lambda: self.now
        self.steps: list[tuple[int, int]] = []

    def step(self) -> list[str]:
        """Run a step. Returns the requests that have a first token now."""
        batch, runner = self.engine.runner.input_batch, self.engine.runner
        assert isinstance(runner, FakeRunner)
        steps = len(runner.steps)
        outputs = self.engine.step()
        assert len(runner.steps) == steps + 1
        prompts = batch.num_prefill_tokens
        self.steps.append((batch.num_tokens - prompts, prompts))
        return [output.request_id for output in outputs if output.num_tokens == 1]


def timed(device: Device) -> LLMEngine:
    """Make each step of the runner move the clock of its device."""
    runner = device.engine.runner
    execute = runner.execute_model

    def run(indices: np.ndarray) -> np.ndarray:
        device.now += HOST_S if runner.input_batch.num_prefill_tokens else DECODE_S
        return execute(indices)

    runner.execute_model = run  # type: ignore[method-assign]
    return device.engine


def serve(device: Device, rate: float, seconds: float) -> list[float]:
    """Serve requests that arrive at random. Returns the time of each first token."""
    draw, engine = random.Random(0), timed(device)
    arrivals: list[float] = [0.0]
    while arrivals[-1] < seconds:
        arrivals.append(arrivals[-1] + draw.expovariate(rate))
    waiting, delays = list(enumerate(arrivals)), []
    while waiting or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            device.now = max(device.now, waiting[0][1])
        while waiting and waiting[0][1] <= device.now:
            number, _ = waiting.pop(0)
            length = min(int(draw.lognormvariate(4.6, 1.0)) + 1, 400)
            params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
            engine.add_request(str(number), [2 + number % 20] * length, params)
        delays += [device.now - arrivals[int(name)] for name in device.step()]
    assert len(delays) == len(arrivals)
    return delays


def host_table(sizes: Sequence[int] = SIZES) -> StepTable:
    """A table of steps that all take the host's time."""
    column = [HOST_S] * len(sizes)
    return StepTable(sizes, TOPK, column, (TOPK, column), (MAX_LEN, column))


@pytest.mark.parametrize("target_s", [0.2, 0.12, 0.05])
def test_no_prompt_waits_for_small_chunks_after_the_start(target_s: float) -> None:
    device = Device(host_table(), target_s)
    delays = serve(device, rate=2, seconds=30)
    # a step that runs, one that the prompt shares with others, and their rest
    assert max(delays) <= 3 * HOST_S
    learning = serve(Device(None, target_s), rate=2, seconds=30)
    assert max(learning) > max(delays)


def test_the_chunks_of_a_long_prompt_fill_a_size() -> None:
    device = Device(host_table(SIZES[:-1]), 0.2)
    engine = timed(device)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for number in range(5):
        engine.add_request(str(number), [2 + number] * 3, params)
    for _ in range(3):
        device.step()
    engine.add_request("long", [9] * 400, SamplingParams(temperature=0, max_tokens=1))
    while "long" not in device.step():
        pass
    mixed = [decode + prompts for decode, prompts in device.steps[3:]]
    # the table ends at 256 tokens, and a longer step is expected to take little more
    assert mixed == [BUDGET] or mixed[0] in SIZES


def test_no_prompt_starves_if_more_arrive_than_fit() -> None:
    device = Device(host_table(), 0.05)
    delays = serve(device, rate=12, seconds=8)
    assert max(delays) < 20
