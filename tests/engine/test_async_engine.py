"""The engine in its thread: streams, cancellation, stop, failures."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.loop import MAX_WAITING_CALLS
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.errors import BusyError
from tests.engine.fakes import expected_greedy, make_engine
from tests.engine.threaded import EngineThread, threaded

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# more than is computed before a starved test comes to end it
ENDLESS = SamplingParams(temperature=0, max_tokens=90_000, ignore_eos=True)
TIMEOUT_S = 60


class GatedRunner:
    """Lets a test hold the engine inside a step."""

    def __init__(self, runner):
        self.runner = runner
        self.input_batch = runner.input_batch
        self.vocab_size, self.info = runner.vocab_size, runner.info
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def execute_model(self, logits_indices):
        """Wait for the gate, then run."""
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return self.runner.execute_model(logits_indices)


class StartedEngine(AsyncEngine):
    """An AsyncEngine whose inner engine tests may look at."""

    def __init__(self):
        self.inner = make_engine(max_model_len=100_000, num_blocks=30_000)
        self.inner.runner = GatedRunner(self.inner.runner)
        self.stats = self.inner.stats
        super().__init__(EngineThread(self.inner))
        self.start()


@pytest.fixture
def engine():
    """A started AsyncEngine with room for long requests; stopped after the test."""
    engine = StartedEngine()
    yield engine
    engine.inner.runner.gate.set()
    engine.stop()
    assert not engine.is_running
    assert not [t for t in threading.enumerate() if t.name == "fd_dsa-engine"]


def run(coroutine):
    """Run a test's coroutine with a limit."""

    async def limited():
        return await asyncio.wait_for(coroutine, TIMEOUT_S)

    return asyncio.run(limited())


async def collect(engine, prompt, params, request_id=None):
    """All outputs of a request."""
    return [output async for output in engine.generate(prompt, params, request_id)]


def wait_until_empty(engine):
    """Wait until no request holds blocks."""
    deadline = time.monotonic() + TIMEOUT_S
    while engine.stats().num_used_blocks or engine.stats().num_waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_concurrent_requests_get_their_own_tokens(engine):
    prompts = [[2 + index, 3] for index in range(9)]

    async def main():
        return await asyncio.gather(*(collect(engine, prompt, GREEDY) for prompt in prompts))

    for prompt, outputs in zip(prompts, run(main()), strict=True):
        assert outputs[-1].token_ids == expected_greedy(prompt, 12, eos=None)
        assert "".join(output.new_text for output in outputs) == outputs[-1].text
        assert [output.finished for output in outputs] == [False] * 11 + [True]
    wait_until_empty(engine)


def test_one_engine_serves_several_event_loops(engine):
    for _ in range(3):
        assert len(run(collect(engine, [2], GREEDY))) == 12


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_aborts_the_request_within_a_step(engine, how):
    async def main():
        stream = engine.generate([2], ENDLESS, "r")

        async def read():
            async for _ in stream:
                pass

        if how == "close":
            await anext(stream)
            await stream.aclose()
        else:
            task = asyncio.create_task(read())
            while not engine.stats().num_running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        steps = engine.stats().num_steps
        while engine.stats().num_used_blocks:
            await asyncio.sleep(0.001)
        # the id is free again, also before the engine has seen the abort
        assert len(await collect(engine, [2], GREEDY, "r")) == 12
        return engine.stats().num_steps - steps

    assert run(main()) < 12 + 50
    wait_until_empty(engine)


def test_the_last_output_of_a_left_request_does_not_reach_the_next_of_its_id(engine):
    gated = engine.inner.runner
    one_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    async def main():
        gated.gate.clear()
        first = asyncio.create_task(collect(engine, [2], one_token, "r"))
        await asyncio.to_thread(gated.entered.wait, TIMEOUT_S)
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(collect(engine, [3], GREEDY, "r"))
        await asyncio.sleep(0.05)
        gated.gate.set()
        return await second

    assert run(main())[-1].token_ids == expected_greedy([3], 12, eos=None)


def test_abort_ends_the_iterator_with_an_output(engine):
    async def main():
        outputs = []
        async for output in engine.generate([2], ENDLESS, "r"):
            outputs.append(output)
            if len(outputs) == 3:
                engine.end("r")
        return outputs

    outputs = run(main())
    assert outputs[-1].finish_reason == "abort"
    count = len(outputs[-1].token_ids)
    assert outputs[-1].token_ids == expected_greedy([2], count, eos=None)
    engine.end("unknown")
    assert len(run(collect(engine, [2], GREEDY))) == 12


def test_requests_that_cannot_run_raise_and_leave_nothing(engine):
    async def main():
        with pytest.raises(ValueError, match="max_model_len"):
            await collect(engine, [2] * 200_000, GREEDY)
        stream = engine.generate([2], ENDLESS, "same")
        await anext(stream)
        with pytest.raises(ValueError, match="'same' is in use"):
            await collect(engine, [2], GREEDY, "same")
        await stream.aclose()

    run(main())
    with pytest.raises(ValueError, match="no tokens"):
        engine.validate([], GREEDY)
    assert engine.validate([2] * 96, SamplingParams(max_tokens=None)) == 99_904
    wait_until_empty(engine)


def test_a_failing_step_ends_every_iterator_with_the_error(engine, caplog):
    inner = engine.inner.runner.runner

    async def main():
        streams = [engine.generate([2 + index], ENDLESS) for index in range(6)]
        # four have a row, the others come to a failing engine
        for stream in streams[:4]:
            await anext(stream)
        inner.fail_at = 0
        results = await asyncio.gather(*(drain(stream) for stream in streams))
        with pytest.raises(RuntimeError, match="engine has failed"):
            await collect(engine, [2], GREEDY)
        return results

    async def drain(stream):
        with pytest.raises(RuntimeError, match="OSError: the device is gone") as caught:
            async for _ in stream:
                pass
        return caught.value

    errors = run(main())
    assert isinstance(engine.errored, OSError)
    assert all(error.__cause__ is engine.errored for error in errors)
    assert not engine.is_running
    assert "the engine has failed" in caplog.text
    engine.end("anything")


def test_stop_aborts_what_still_runs_and_refuses_new_requests(engine):
    async def main():
        tasks = [asyncio.create_task(collect(engine, [2 + i], ENDLESS)) for i in range(6)]
        while engine.stats().num_steps < 3:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(RuntimeError, match="takes no new requests"):
            await collect(engine, [2], GREEDY)
        return await asyncio.gather(*tasks)

    for outputs in run(main()):
        assert outputs[-1].finish_reason == "abort"
    assert engine.stats().num_used_blocks == 0
    assert engine.errored is None
    engine.stop()


def test_an_event_loop_that_dies_does_not_keep_its_requests(engine):
    gated = engine.inner.runner
    loop = asyncio.new_event_loop()

    async def first():
        stream = engine.generate([2], ENDLESS)
        await anext(stream)
        gated.gate.clear()
        return stream

    stream = loop.run_until_complete(first())
    loop.close()
    gated.gate.set()
    wait_until_empty(engine)
    assert len(run(collect(engine, [3], GREEDY))) == 12
    assert engine.errored is None
    del stream


def test_an_engine_that_was_not_started_says_so():
    engine = threaded(make_engine())
    assert not engine.is_running
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        run(collect(engine, [2], GREEDY))
    engine.stop()
    assert engine.max_model_len == 64
    assert engine.tokenizer.eos_token_id == 1


def test_questions_whose_callers_have_left_are_not_answered():
    """Questions that wait have a limit too."""
    gate, checked = threading.Event(), []

    def check(params):
        checked.append(params.seed)
        assert gate.wait(TIMEOUT_S)

    inner = make_engine()
    inner.grammars.check = check
    asking = threaded(inner)
    asking.start()

    async def ask_and_leave():
        tasks = [
            asyncio.create_task(asking.check_form(SamplingParams(seed=seed)))
            for seed in range(MAX_WAITING_CALLS)
        ]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match=f"{MAX_WAITING_CALLS} grammars wait to be compiled"):
            await asking.check_form(SamplingParams(seed=-1))
        for task in tasks[:-1]:
            task.cancel()
        await asyncio.gather(*tasks[:-1], return_exceptions=True)
        gate.set()
        await tasks[-1]
        await asking.check_form(SamplingParams(seed=-2))

    asyncio.run(asyncio.wait_for(ask_and_leave(), TIMEOUT_S))
    asking.stop()
    assert checked == [0, MAX_WAITING_CALLS - 1, -2]
