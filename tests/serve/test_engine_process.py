"""The engine in a process of its own: the same outputs, and an end of either process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import EngineConfig
from fd_dsa.engine.async_engine import AsyncEngine
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.errors import FdDsaError
from fd_dsa.serve import engine_process
from fd_dsa.serve.engine_process import EngineProcess
from fd_dsa.startup.progress import StartupProgress
from tests.engine.fakes import make_engine, run_all
from tests.engine.threaded import threaded
from tests.proc import is_alive
from tests.serve.conftest import wait_until
from tests.serve.processes import child_of

TIMEOUT_S = 60
SIZES = {"num_blocks": 30_000, "max_model_len": 100_000}
BODY = f"""
from tests.engine.fakes import make_engine, run_all
return make_engine(**{SIZES})
"""
ENDLESS = SamplingParams(temperature=0, max_tokens=90_000, ignore_eos=True)
FIELDS = (
    *("request_id", "index", "prompt_token_ids", "token_ids", "text", "new_token_ids", "new_text"),
    *("finish_reason", "stop_reason", "num_cached_tokens", "num_host_cached_tokens"),
    *("logprobs", "new_logprobs"),
    *("prompt_logprobs", "topk_positions"),
)


@contextmanager
def process_of(body: str) -> Iterator[AsyncEngine]:
    """An engine in a process, built by the body of a factory."""
    child = child_of(body)

    class Process(EngineProcess):
        COMMAND = (sys.executable, "-c", child)

    engine = AsyncEngine(Process(EngineConfig(device="cpu"), StartupProgress()))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert not engine.is_running


@pytest.fixture(scope="module")
def processed() -> Iterator[AsyncEngine]:
    """An engine in a process, for tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "HEARTBEAT_S", 0.05)
        with process_of(BODY) as engine:
            yield engine


def run(coroutine: Any) -> Any:
    """The result of a test's coroutine, within a limit."""
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


async def collect(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams, request_id: str
) -> list[RequestOutput]:
    """All outputs of a request."""
    return [output async for output in engine.generate(prompt, params, request_id)]


def shown(outputs: list[RequestOutput]) -> list[dict[str, Any]]:
    """Return outputs as callers see them, without times and the type of empty lists."""
    return [{name: getattr(output, name) or None for name in FIELDS} for output in outputs]


REQUESTS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, max_tokens=30, logprobs=3, prompt_logprobs=2),
    SamplingParams(temperature=1.2, seed=4, n=3, max_tokens=12, prompt_logprobs=1, logprobs=0),
    SamplingParams(temperature=1, seed=5, n=2, max_tokens=40, stop=["ab", "c"], logprobs=1),
    SamplingParams(temperature=0, max_tokens=5, bad_words_token_ids=list(range(40))),
]


def test_outputs_are_those_of_the_engine_itself(processed: AsyncEngine) -> None:
    """In a thread and in a process, where each step sends what it has added."""
    prompt = [5, 9, 7, 5, 9, 7, 30]

    async def outputs_of(engine: AsyncEngine) -> list[list[RequestOutput]]:
        return [await collect(engine, prompt, params, "r") for params in REQUESTS]

    direct = make_engine(**SIZES)
    expected = []
    for params in REQUESTS:
        direct.add_request("r", prompt, params)
        expected.append(run_all(direct)["r"])
    inside = threaded(make_engine(**SIZES))
    inside.start()
    in_thread = run(outputs_of(inside))
    inside.stop()
    for all_outputs in (in_thread, run(outputs_of(processed))):
        for outputs, twins in zip(all_outputs, expected, strict=True):
            assert shown(outputs) == shown(twins)
            assert outputs[-1].finished
            for output, twin in zip(outputs, twins, strict=True):
                assert repr(output.error) == repr(twin.error)
                first = output.first_token_time
                assert first is None or output.arrival_time < first


def test_one_process_serves_many_and_frees_what_is_left(processed: AsyncEngine) -> None:
    async def main(engine: AsyncEngine) -> None:
        async def leave(number: int) -> None:
            stream = engine.generate([5, number], ENDLESS)
            await anext(stream)
            await stream.aclose()

        async def abort() -> str | None:
            outputs = []
            async for output in engine.generate([7], ENDLESS, "aborted"):
                outputs.append(output)
                if len(outputs) == 3:
                    engine.end("aborted")
            return outputs[-1].finish_reason

        before = dict((await engine.snapshot())[1].finished)
        whole = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        ended = await asyncio.gather(
            *(leave(number) for number in range(5, 25)),
            *(collect(engine, [9, number], whole, f"r{number}") for number in range(5, 25)),
            abort(),
        )
        assert ended[-1] == "abort"
        with pytest.raises(ValueError, match="max_model_len"):
            await collect(engine, [5] * 200_000, whole, "long")
        wrong = StructuredOutputsParams(regex="(", source="guided_regex")
        with pytest.raises(ValueError, match="guided_regex cannot be used"):
            await engine.check_form(SamplingParams(structured_outputs=wrong))
        right = StructuredOutputsParams(regex="(a|b)+")
        await engine.check_form(SamplingParams(structured_outputs=right))
        while (await engine.snapshot())[0].num_used_blocks:
            await asyncio.sleep(0.01)
        stats, metrics = await engine.snapshot()
        assert stats.num_running == stats.num_waiting == 0
        counts = {reason: metrics.finished[reason] - count for reason, count in before.items()}
        assert counts["length"] == 20 and counts["abort"] == 21

    run(main(processed))


def test_a_process_that_is_killed_ends_every_request_with_an_error() -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = engine.generate([5], ENDLESS)
        await anext(stream)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"signal 9 \(SIGKILL\) while it served"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="the engine has failed"):
            await engine.snapshot()
        with pytest.raises(RuntimeError, match="the engine has failed"):
            await collect(engine, [5], ENDLESS, "later")

    with process_of(BODY) as engine:
        run(main(engine))
        assert isinstance(engine.errored, FdDsaError)


def test_a_process_that_is_frozen_is_noticed_until_it_goes_on(processed: AsyncEngine) -> None:
    assert processed.pid is not None
    time.sleep(0.3)
    assert processed.silent_s < 0.3
    os.kill(processed.pid, signal.SIGSTOP)
    wait_until(lambda: processed.silent_s > 1.0)
    # commands fill the socket, and the thread that writes them waits
    for _ in range(100):
        processed.end("nothing")
    os.kill(processed.pid, signal.SIGCONT)
    wait_until(lambda: processed.silent_s < 0.2)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("os.kill(os.getpid(), 9)", r"by signal 9 \(SIGKILL\) before it was ready; the system may"),
        ("os._exit(3)", "with status 3 before it was ready"),
        ("from fd_dsa.errors import ConfigError\nraise ConfigError('--x: no')", "^--x: no$"),
    ],
)
def test_a_process_that_does_not_come_up_is_one_error(body: str, text: str) -> None:
    with pytest.raises(FdDsaError, match=text), process_of(body):
        pass


def test_the_engines_process_ends_with_the_servers(tmp_path: Path) -> None:
    """The server ends in several ways, and the engine works or waits."""
    pid_file = tmp_path / "pid"
    body = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
    # a call of a library that holds Python's lock
    body += "import ctypes\nctypes.PyDLL(None).sleep(3600)"
    code = f"""
import sys
from fd_dsa.config import EngineConfig
from fd_dsa.serve.engine_process import EngineProcess
from fd_dsa.startup.progress import StartupProgress
EngineProcess.COMMAND = (sys.executable, "-c", {child_of(body)!r})
EngineProcess(EngineConfig(device="cpu"), StartupProgress())
"""
    server = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    finally:
        server.kill()
        server.communicate()
    wait_until(lambda: not is_alive(int(pid_file.read_text())))
