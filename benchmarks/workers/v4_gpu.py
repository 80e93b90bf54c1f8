"""Worker: the embedded engine on a GPU, with DeepSeek-V4's widths and random weights."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.workers import gpu_engine

# classes of kernels, by parts of their names; the first that fits
CLASSES = {
    "sums over ranks": ("all_reduce", "nccl"),
    "routed experts": ("expert_gemm_kernel", "multiply_experts"),
    "choice, groups and sum of experts": (
        "choose_experts",
        "look_up_experts",
        "group_pairs",
        "sum_experts",
    ),
    "GEMMs in FP8": ("fp8_linear_kernel", "side_by_side", "_qq"),
    "grouped GEMM of attention": ("head_gemm_kernel",),
    "other GEMMs": ("nvjet", "splitKreduce", "gemm", "__nv_bfloat16"),
    "residual streams": ("expand_streams", "read_streams"),
    "index scores and selection": ("tile_", "logits_kernel", "topk", "rotate_heads"),
    "attention": ("attend_v4", "attend", "combine"),
    "latents, keys, entries, rings": ("write_step", "keep_step", "copy_slot"),
    "norms, SiLU, quantisation": ("rms_norm", "activate"),
    "index arrays of the step": ("place_step", "expand_kernel", "csa_rows"),
    "rest": ("",),
}
STEP, LAYER = "place_step_kernel", "write_step_kernel"
"""Kernels that every step begins with, and that every layer has once."""


class Phases(logging.Handler):
    """Phases of a start, and the seconds after which each ended."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._begin = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep and print a line."""
        self.lines.append(f"{time.perf_counter() - self._begin:.1f} s: {record.getMessage()}")
        print(self.lines[-1], file=sys.stderr, flush=True)


class Engine(gpu_engine.Engine):
    """The engine of `gpu_engine`, which knows the kinds of its layers and its memory plan.

    Args:
        kinds: kind of each layer.
        options: arguments of the base.
    """

    def __init__(self, kinds: Sequence[str], **options: Any) -> None:
        self._kinds, self._phases = kinds, Phases()
        self._plan: Any = None
        self._free_before = 0
        super().__init__(**options)

    def prepare(self) -> None:
        """Keep the plan and the free memory of its time, and the phases of the start."""
        from fd_dsa.device.resolve import free_device_bytes
        from fd_dsa.startup import build, progress

        progress.logger.setLevel(logging.INFO)
        progress.logger.addHandler(self._phases)
        make_plan = build.make_plan

        def noted(*given: Any) -> Any:
            self._plan = make_plan(*given)
            self._free_before = free_device_bytes(self._plan.device) or 0
            return self._plan

        build.make_plan = noted

    def start_up(self) -> dict[str, Any]:
        """Return seconds of the start and of its phases, and from then to the first token."""
        return super().start_up() | {"phases": self._phases.lines}

    def late_compilations(self) -> int:
        """Return the number of launches since the start that had to compile a kernel."""
        count: int = self._engine.runner.counters.late_compilations
        return count

    def memory(self) -> dict[str, Any]:
        """Return the memory of the plan by purpose, and the memory that is used, bytes.

        States are those of rows and of snapshots, with their rings.

        A CPU has no number of used bytes.
        """
        from fd_dsa.device.resolve import free_device_bytes, traits_of
        from fd_dsa.startup.plan import workspace_bytes

        plan = self._plan
        sizes, config = plan.memory, plan.config
        found = {
            "weights": sizes.weight_bytes,
            "blocks": sizes.kv_cache_bytes,
            "states": sizes.state_bytes,
            "graphs": sizes.graph_bytes,
            "activations": sizes.activation_bytes,
            "work": 0,
        }
        used = None
        if plan.device != "cpu":
            traits = traits_of(plan.device)
            found["work"] = workspace_bytes(config, plan.model_config, plan.caches, traits)
            used = self._free_before - (free_device_bytes(plan.device) or 0)
        return {
            "bytes_per_token": sizes.bytes_per_block / sizes.block_size,
            "num_tokens": sizes.num_blocks * sizes.block_size,
            "planned": found,
            "planned_bytes": sum(found.values()),
            "used_bytes": used,
        }

    def experts_hit(self, batch: int, prompt: int) -> dict[str, float]:
        """Return the experts of a layer that a decode step reads, on average over the layers.

        The step is eager, and its experts are read back. Call this after all measurements.
        """
        from fd_dsa.models.deepseek_v4 import device_moe

        runner, counts = self._engine.runner, list[int]()

        def counting(choose: Any) -> Any:
            def chosen(*given: Any, **named: Any) -> Any:
                choice = choose(*given, **named)
                counts.append(len(np.unique(choice.ids.numpy())))
                return choice

            return chosen

        self._submit(batch, prompt, batch * prompt // self._chunk + 24)
        while len(self._engine.step()) < batch:
            pass
        graphs, native = runner.graphs, (device_moe.choose_experts, device_moe.look_up_experts)
        runner.graphs = None
        device_moe.choose_experts, device_moe.look_up_experts = map(counting, native)
        self._engine.step()
        device_moe.choose_experts, device_moe.look_up_experts = native
        runner.graphs = graphs
        self._drain()
        return {"rows": batch, "experts": float(np.mean(counts)), "layers": len(counts)}

    def of_steps(self, events: Any, steps: int) -> dict[str, Any]:
        """Return the kernels of decode steps, and the launches of a layer of each kind."""
        from torch.autograd import DeviceType

        kernels = [
            (event.time_range.start, event.name)
            for event in events
            if event.device_type == DeviceType.CUDA
        ]
        names = [name for _, name in sorted(kernels)]
        return gpu_engine.profiled(events, steps) | {"layers": by_kind(names, self._kinds)}


def by_kind(names: Sequence[str], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the launches of a layer of each kind: the median of the layers, and the most.

    A layer counts from its LAYER to that of the next layer. The launches before a LAYER are the
    same in all layers, so the sum is that of a layer. The last layer of a step does not count.

    Args:
        names: kernels in their order. Steps that are cut off do not count.
        kinds: kind of each layer of a step.
    """
    places = [place for place, name in enumerate(names) if STEP in name]
    found: dict[str, list[int]] = {}
    for begin, end in pairwise([*places, len(names)]):
        marks = [place for place in range(begin, end) if LAYER in names[place]]
        if len(marks) == len(kinds):
            for kind, (first, last) in zip(kinds, pairwise(marks), strict=False):
                found.setdefault(kind, []).append(last - first)
    return {
        kind: {"launches": float(np.median(counts)), "most": max(counts)}
        for kind, counts in found.items()
    }
