"""Requests that have ended are free without a garbage collection, which would delay a step."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.loop import AddRequest, UtilityCall
from fd_dsa.engine.output import OutputState, RequestOutput
from fd_dsa.engine.prompt_lookup import PromptLookup
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.request import Request
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.errors import ArgumentError
from tests.engine.byte_model import VOCAB_SIZE, make_engine
from tests.engine.fakes import run_all
from tests.engine.test_async_scheduling import GREEDY, new_engine
from tests.engine.threaded import threaded

DROPPED_S = 10.0
PROMPT = list(range(100, 140))
FORM = StructuredOutputsParams(regex="[a-d]{3,10}(Z|[a-c]{5})")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 3},
    "stop strings": {"stop": ["a", "b", "zz"], "n": 2},
    "scores": {"logprobs": 2, "prompt_logprobs": 1, "n": 2},
    "rules": {"repetition_penalty": 1.2, "bad_words": ["ab"], "min_tokens": 3},
    "form": {"structured_outputs": FORM, "n": 2},
    "reasoning": {"reasoning": Reasoning("<think>"), "structured_outputs": FORM, "stop": "c"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def params_of(kind: str, **fields: Any) -> SamplingParams:
    """Parameters of a kind of request."""
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **KINDS[kind], **fields})


def living(kinds: tuple[type, ...], old: Sequence[object] = ()) -> list[object]:
    """Objects of some classes, without old ones. Their slots leave no room for weak references."""
    found = [one for one in gc.get_objects() if isinstance(one, kinds)]
    return [one for one in found if not any(one is other for other in old)]


@contextmanager
def all_freed(*kinds: type) -> Iterator[None]:
    """Check that a block leaves no requests, outputs or other objects that it has made.

    Other threads get some time to drop theirs.

    Args:
        kinds: classes of the other objects.
    """
    kinds += (Request, OutputState, RequestOutput, AddRequest)
    gc.collect()
    old, was_enabled, end_s = living(kinds), gc.isenabled(), time.monotonic() + DROPPED_S
    gc.disable()
    try:
        yield
        while (left := living(kinds, old)) and time.monotonic() < end_s:
            del left
            time.sleep(0.01)
        assert not left, [type(one).__name__ for one in left]
    finally:
        if was_enabled:
            gc.enable()


def abort(engine: LLMEngine, params: SamplingParams, num_steps: int = 4) -> None:
    """Abort a request after a few steps."""
    engine.add_request("r", PROMPT, params)
    for _ in range(num_steps):
        engine.step()
    assert engine.abort_request("r")


@every_kind
def test_finished_and_aborted_requests_are_free(kind: str) -> None:
    engine, params = make_engine(), params_of(kind)
    with LLM.from_engine(engine) as llm, all_freed():
        assert len(llm.generate([PROMPT, PROMPT[:5]], params)) == 2
        stream = llm.generate([PROMPT, PROMPT[:5]], params, stream=True)
        next(stream)
        del stream
        abort(engine, params)
        abort(engine, params, num_steps=0)


@every_kind
def test_requests_with_drafts_are_free(kind: str) -> None:
    engine, params = make_engine(spec_decoder=SpecDecoder(PromptLookup(3, 1), 3)), params_of(kind)
    with all_freed():
        engine.add_request("r", [100, 101] * 20, params)
        run_all(engine)
        abort(engine, params)


def test_preempted_requests_are_free() -> None:
    engine, params = make_engine(num_blocks=24), params_of("several", max_tokens=50)
    with all_freed():
        engine.add_request("r", PROMPT, params)
        engine.add_request("s", PROMPT[:10], params)
        while not any(request.preempted_time for request in engine.scheduler.waiting):
            engine.step()
        engine.abort_request("s")
        run_all(engine)
    assert engine.stats().num_preemptions


def test_requests_of_steps_in_flight_are_free() -> None:
    engine, _ = new_engine()
    with all_freed():
        engine.add_request("r", [2, 3], replace(GREEDY, n=2))
        run_all(engine)
        engine.add_request("r", [2, 3], GREEDY)
        engine.step()
        assert engine.abort_all()
        # the engine drops the step in flight
        assert engine.step() == []


def test_failed_and_refused_requests_are_free() -> None:
    engine = make_engine()
    broken = params_of("plain", structured_outputs=StructuredOutputsParams(regex="(("))
    with all_freed():
        engine.add_request("no form", PROMPT, broken)
        engine.add_request("r", PROMPT, params_of("plain", bad_words_token_ids=range(VOCAB_SIZE)))
        ends = run_all(engine)
        assert [outputs[-1].finish_reason for outputs in ends.values()] == ["error"] * 2
        del ends
        with pytest.raises(ValueError, match="prompt has 4000 tokens"):
            engine.add_request("long", PROMPT * 100, params_of("several"))


def test_arguments_of_a_refused_call_are_free() -> None:
    with (
        LLM.from_engine(make_engine()) as llm,
        all_freed(ArgumentError),
        pytest.raises(ArgumentError, match="sampling_parms"),
    ):
        llm.generate([PROMPT], sampling_parms=None)  # type: ignore[call-overload]


Run = Callable[[AsyncEngine, SamplingParams], Any]


async def read_all(engine: AsyncEngine, params: SamplingParams) -> None:
    """Read all outputs."""
    async for output in engine.generate(PROMPT, params):
        assert output.error is None


async def leave(engine: AsyncEngine, params: SamplingParams) -> None:
    """Read one output."""
    async with aclosing(engine.generate(PROMPT, params)) as outputs:
        await anext(outputs)


async def end(engine: AsyncEngine, params: SamplingParams) -> None:
    """End the request after an output."""
    async for _ in engine.generate(PROMPT, params, "r"):
        engine.end("r")


async def cancel(engine: AsyncEngine, params: SamplingParams) -> None:
    """Cancel a reader."""
    task = asyncio.create_task(read_all(engine, params))
    await asyncio.sleep(0.01)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def refuse(engine: AsyncEngine, params: SamplingParams) -> None:
    """Send a prompt that is too long, and a form that cannot be compiled."""
    with pytest.raises(ValueError, match="prompt has 4000 tokens"):
        await anext(engine.generate(PROMPT * 100, params))
    broken = StructuredOutputsParams(regex="((")
    with pytest.raises(ValueError, match="unclosed"):
        await engine.check_form(replace(params, structured_outputs=broken))


@pytest.mark.parametrize("run", [read_all, leave, end, cancel, refuse])
@pytest.mark.parametrize("kind", ["plain", "several", "scores", "form"])
def test_requests_of_a_server_are_free(kind: str, run: Run) -> None:
    inner = make_engine()
    engine = threaded(inner)
    engine.start()

    async def run_until_idle() -> None:
        await asyncio.wait_for(run(engine, params_of(kind)), 60)
        while inner.has_unfinished_requests():
            await asyncio.sleep(0.001)

    with all_freed(UtilityCall):
        asyncio.run(run_until_idle())
        engine.stop()
