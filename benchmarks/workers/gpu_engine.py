"""Worker: the embedded engine on a GPU, with DeepSeek-V3.2's widths and random weights."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks._harness import random_prompts

# classes of kernels, by parts of their names; the first that fits
CLASSES = {
    "sums over ranks": ("all_reduce", "nccl"),
    "routed experts": ("expert_gemm_kernel", "multiply_experts"),
    "choice, groups and sum of experts": ("choose_experts", "group_pairs", "sum_experts"),
    "GEMMs in FP8": ("fp8_linear_kernel", "side_by_side", "_qq", "__nv_bfloat16"),
    "head, router": ("nvjet", "splitKreduce"),
    "keys and values of heads": ("head_gemm_kernel",),
    "indexer": ("tile_", "topk", "prepare_query_kernel", "project_indexer"),
    "attention": ("attend", "SparseMla", "combine_kernel", "gather_keys", "dequantize"),
    "norms, SiLU, quantisation": ("rms_norm", "activate"),
    "cache writes, queries": ("write_caches", "prepare_mla_query"),
    "rest": ("",),
}


def open_device(rig: bool, device: str) -> str:
    """Return the device of an engine with our kernels loaded. Call it before Paddle's import.

    Args:
        rig, device: as of Engine.
    """
    if rig:
        from tests.gpu_rig import load

        # Paddle looks for plug-ins when it is imported
        device = load("real").device
        from fd_dsa.startup.ranks import Ranks

        Ranks.COMMAND = (sys.executable, "-m", "tests.distributed.rig_rank")
    if device != "cpu":
        from custom_ops.build_library import build_library
        from fd_dsa import custom_ops

        custom_ops.use_library(build_library())
    return device


class Engine:
    """The engine, started once.

    Args:
        model: folder of config.json.
        rig: True for the device of the test plug-in, with Paddle's CPU wheel.
        config: fields of EngineConfig.
        device: "gpu", or "cpu" for a dry run.
    """

    def __init__(self, model: str, rig: bool, config: dict[str, Any], device: str = "gpu") -> None:
        begin = time.perf_counter()
        device = open_device(rig, device)
        from fd_dsa import LLM
        from fd_dsa.config import demo_model_path

        self.prepare()

        config = {"load_format": "dummy"} | config
        # ids are neither read nor written as text
        self._llm = LLM(model, device=device, tokenizer=demo_model_path(), **config)
        self._engine = self._llm.engine
        self._chunk = config["max_num_batched_tokens"]
        self._num_runs = 0
        self._start_s = time.perf_counter() - begin

    def prepare(self) -> None:
        """Change what the engine is made of."""

    def start_up(self) -> dict[str, float]:
        """Return seconds of the engine's start, and from then to its first token."""
        begin = time.perf_counter()
        self._submit(1, 100, 1)
        self._drain()
        return {"engine_s": self._start_s, "first_token_s": time.perf_counter() - begin}

    def decode(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """Return milliseconds of each of `new` steps in which all requests decode."""
        spare = batch * prompt // self._chunk + 8
        self._submit(batch, prompt, spare + new)
        log = self._drain()
        steps = [1e3 * (b[0] - a[0]) for a, b in pairwise(log) if a[1] == b[1] == batch][4:new]
        return {"tpot_ms": float(np.median(steps)), "p95_ms": float(np.percentile(steps, 95))}

    def prefill(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """Return prompt tokens per second of prompts that arrive together."""
        self._submit(batch, prompt, new)
        return {"tok_s": batch * prompt / self._drain()[-1][0]}

    def mixed(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """Return tokens per second of requests that arrive together."""
        self._submit(batch, prompt, new)
        return {"tok_s": batch * (prompt + new) / self._drain()[-1][0]}

    def alone(self, prompt: int, new: int) -> dict[str, float]:
        """Return milliseconds to the first token of a request, and of each of `new` after it."""
        self._submit(1, prompt, new + 1)
        times = [1e3 * seconds for seconds, _ in self._drain()]
        return {"first_ms": times[0], "tpot_ms": float(np.median(np.diff(times)[4:]))}

    def profile(self, batch: int, prompt: int, steps: int) -> dict[str, Any]:
        """Return the kernels of a decode step: microseconds and launches of each, and the sum."""
        from torch.profiler import ProfilerActivity, profile

        recorder = profile(activities=[ProfilerActivity.CUDA])
        self._submit(batch, prompt, batch * prompt // self._chunk + steps + 24)
        full, wall_s = 0, 0.0
        while self._engine.has_unfinished_requests():
            if full == 12:
                with recorder:
                    begin = time.perf_counter()
                    for _ in range(steps):
                        self._engine.step()
                    wall_s = time.perf_counter() - begin
                full += steps
            full += len(self._engine.step()) == batch
        return self.of_steps(recorder.events(), steps) | {"wall_us": 1e6 * wall_s / steps}

    def of_steps(self, events: Any, steps: int) -> dict[str, Any]:
        """Return the kernels of decode steps, by torch's events."""
        return profiled(events, steps)

    def profile_prompts(self, batch: int, prompt: int) -> dict[str, Any]:
        """Profile prompts that arrive together, after a run that compiles."""
        from torch.profiler import ProfilerActivity, profile

        recorder = profile(activities=[ProfilerActivity.CUDA])
        for context in (contextlib.nullcontext(), recorder):
            self._submit(batch, prompt, 1)
            with context:
                wall_s = self._drain()[-1][0]
        return profiled(recorder.events(), 1) | {"wall_us": 1e6 * wall_s}

    def _submit(self, batch: int, prompt: int, new: int) -> None:
        """Add requests whose prompts nothing has seen."""
        from fd_dsa import SamplingParams

        self._num_runs += 1
        vocab_size = self._engine.runner.vocab_size
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for index, ids in enumerate(random_prompts(batch, prompt, vocab_size, self._num_runs)):
            self._engine.add_request(f"{self._num_runs}-{index}", ids, params)

    def _drain(self) -> list[tuple[float, int]]:
        """Step until nothing is left: time and number of tokens of the steps that gave any."""
        log, begin = [], time.perf_counter()
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if outputs:
                log.append((time.perf_counter() - begin, len(outputs)))
        return log


def profiled(events: Any, steps: int) -> dict[str, Any]:
    """Return the time and launches of each kernel in a step, by torch's events.

    A kernel has a name, microseconds, launches, and its own microseconds. These begin when the
    kernels ahead of it have ended, so their sum is the time in which any kernel runs.
    """
    from torch.autograd import DeviceType

    kernels: dict[str, list[float]] = {}
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA
    )
    busy, reach = 0.0, 0.0
    for start, end, name in spans:
        own = max(0.0, end - max(start, reach))
        entry = kernels.setdefault(name, [0.0, 0.0, 0.0])
        for place, value in enumerate((end - start, 1, own)):
            entry[place] += value / steps
        busy += own
        reach = max(reach, end)
    rows = sorted(([name[:120], *entry] for name, entry in kernels.items()), key=lambda r: -r[1])
    return {"busy_us": busy / steps, "launches": sum(row[2] for row in rows), "kernels": rows}


def by_class(
    profiles: Mapping[str, Any], classes: Mapping[str, tuple[str, ...]] = CLASSES
) -> list[dict[str, Any]]:
    """Return own microseconds of each class of kernels in each profile, and of any kernel."""
    rows: dict[str, dict[str, Any]] = {name: {"class": name} for name in classes}
    for column, profile in profiles.items():
        for row in rows.values():
            row[f"us_{column}"] = 0.0
        for kernel, _, _, us in profile["kernels"]:
            fits = (name for name, parts in classes.items() if any(p in kernel for p in parts))
            rows[next(fits)][f"us_{column}"] += us
    busy = {f"us_{column}": profile["busy_us"] for column, profile in profiles.items()}
    return [*rows.values(), {"class": "any kernel runs"} | busy]
