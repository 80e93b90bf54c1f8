"""Worker: an engine over a driver that does nothing, whose steps are timed on the host."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from benchmarks._harness import random_prompts
from tests.null_driver.engine import NullDriver, open_engine

CONFIG: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_model_len": 33024,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 8192,
    "kv_cache_memory_bytes": "20G",
    "enforce_eager": True,
}
LOOP_TURNS = 4000
# steps before the first timed one, in which the launcher meets all arguments
_WARM_UP, _NEW_TOKENS, _VOCABULARY = 6, 20_000, 100_000
_SAMPLE_EVERY_S = 0.001

PADDLE, ALLOCATION, REST = "other calls of Paddle", "allocation of tensors", "rest"
# cause -> parts of "/path/of/file.py:function"; the first cause that fits counts
CAUSES = {
    ALLOCATION: ("/paddle/tensor/creation.py:", "/fd_dsa/device/allocation.py:"),
    PADDLE: ("/paddle/",),
    "checks of tensors": (
        "/triton_runtime/device_api.py:",
        "/triton_runtime/kernel.py:can_launch",
        "/triton_runtime/kernel.py:key",
        # of earlier releases
        "/triton_runtime/device.py:",
        "/triton_runtime/fastpath.py:",
    ),
    "launch": ("/fd_dsa/triton_runtime/", "<launch of"),
    "next_power_of_2 of Triton": ("/triton/",),
    "cuBLASLt": ("/fd_dsa/ops/cublaslt", "/fd_dsa/ops/_cublaslt"),
    "kernels of custom_ops": ("library_kernel.py:", "custom_op.py:", "expert_gemm_cuda.py:"),
    "operators": ("/fd_dsa/ops/",),
    "sums over ranks": ("/fd_dsa/distributed/",),
    "attention": ("/fd_dsa/attention/",),
    "layers": ("/fd_dsa/models/",),
    "step inputs": ("/fd_dsa/step/", "/fd_dsa/device/"),
    "engine": ("/fd_dsa/engine/", "/fd_dsa/runner/"),
}


class Engine:
    """The engine, built once. All cases are eager steps.

    Args:
        model: fields of config.json.
        ranks: ranks of the model, of which this process is the first.
    """

    def __init__(self, model: Mapping[str, Any], ranks: int = 1) -> None:
        self._driver = NullDriver(ranks)
        with tempfile.TemporaryDirectory() as folder:
            config = CONFIG | {"tensor_parallel_size": ranks}
            self._engine = open_engine(self._driver, model, Path(folder), **config)
        self._ids = count()

    def times(self, rows: int, context: int, prompt: int, steps: int) -> dict[str, Any]:
        """Return launches of a step, and processor time of `steps` steps and of the fixed loop.

        Args:
            rows: requests that decode.
            context: tokens of each of them.
            prompt: tokens of a new prompt in each step; 0 = none.
            steps: number of timed steps.
        """
        cpu_ms, loop_ms, launches = [], [], 0
        for _ in self._steps(rows, context, prompt, steps):
            before = fixed_loop_ms()
            launched, begin = self._driver.launches(), time.thread_time()
            self._engine.step()
            cpu_ms.append(1e3 * (time.thread_time() - begin))
            launches = self._driver.launches() - launched
            loop_ms.append((before + fixed_loop_ms()) / 2)
        return {"launches": launches, "cpu_ms": cpu_ms, "loop_ms": loop_ms}

    def causes(self, rows: int, context: int, prompt: int, steps: int) -> dict[str, Any]:
        """Return calls of one step by cause, and samples of `steps` steps by cause.

        A sample is taken after each millisecond of processor time, or as often as the system can.
        """
        samples: Counter[str] = Counter()
        is_inside = False

        def sample(number: int, frame: FrameType | None) -> None:
            if is_inside:
                samples[cause_of(frame)] += 1

        calls = self._calls(rows, context, prompt)
        before = signal.signal(signal.SIGPROF, sample)
        # one timer for all steps, because a new one always takes its first sample at the same place
        signal.setitimer(signal.ITIMER_PROF, _SAMPLE_EVERY_S, _SAMPLE_EVERY_S)
        try:
            for _ in self._steps(rows, context, prompt, steps):
                is_inside = True
                self._engine.step()
                is_inside = False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
        return {"calls": calls, "samples": samples}

    def _calls(self, rows: int, context: int, prompt: int) -> Counter[str]:
        """Return the calls of functions in one step, those of C included, by cause."""
        calls: Counter[str] = Counter()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if event in ("call", "c_call"):
                calls[cause_of(frame)] += 1

        for _ in self._steps(rows, context, prompt, 1):
            sys.setprofile(note)
            try:
                self._engine.step()
            finally:
                sys.setprofile(None)
        return calls

    def _steps(self, rows: int, context: int, prompt: int, steps: int) -> Iterator[None]:
        """Yield before each step of a case, which the caller makes by `step`."""
        names = self._submit(rows, context)
        started: set[str] = set()
        while len(started) < rows:
            started.update(output.request_id for output in self._engine.step())
        for number in range(_WARM_UP + steps):
            new = self._submit(1, prompt) if prompt else []
            if number < _WARM_UP:
                self._engine.step()
            else:
                yield
            for name in new:
                # a token of the prompt may be in flight
                self._engine.abort_request(name)
                self._engine.step()
        for name in names:
            self._engine.abort_request(name)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _submit(self, requests: int, tokens: int) -> list[str]:
        """Add requests with random prompts of so many tokens. Returns their names."""
        from fd_dsa import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True)
        names = []
        for _ in range(requests):
            number = next(self._ids)
            names.append(str(number))
            [ids] = random_prompts(1, tokens, _VOCABULARY, seed=number)
            self._engine.add_request(names[-1], ids, params)
        return names


class _Held:
    """Object of the fixed loop."""

    __slots__ = ("other", "value")

    def __init__(self, value: int) -> None:
        self.value, self.other = value, None

    def give(self, *arguments: Any, **named: Any) -> int:
        """Return the value, whatever the arguments are."""
        return self.value


def fixed_loop_ms() -> float:
    """Return milliseconds of a fixed loop, by which times of a busy machine are compared."""
    begin = time.thread_time()
    known: dict[int, int] = {}
    held: Any = _Held(1)
    for turn in range(LOOP_TURNS):
        known[turn & 63] = held.give(turn, k=turn)
        held.other = turn, held, known
        held.value, *_ = held.other
    held.other = None
    return 1e3 * (time.thread_time() - begin)


def cause_of(frame: FrameType | None) -> str:
    """Return the cause of the work in a frame: that of the innermost frame that has one."""
    in_paddle = False
    while frame is not None:
        found = _cause_of_code(frame.f_code)
        if found == PADDLE:
            # a wrapper of Paddle may belong to the call that makes a tensor
            in_paddle = True
        elif found:
            return PADDLE if in_paddle and found != ALLOCATION else found
        frame = frame.f_back
    return REST


@cache
def _cause_of_code(code: CodeType) -> str:
    """Return the cause of a function by its file and name, "" without one."""
    place = f"{code.co_filename}:{code.co_name}"
    return next((c for c, parts in CAUSES.items() if any(p in place for p in parts)), "")
