"""The sides of the V4 preparation on torch tensors: what each queues for one decode step.

`start` begins a sequence of steps. Each step is passed to `stage`, which may run while the device
works on the previous one, and `finish` queues the rest on the current stream. Only our side has
work for `stage`; the others do everything in `finish`.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks import _gpu
from benchmarks._staging_timeline import events_of, summary
from benchmarks._v4_baselines import GROUPS, NAMES, HostArrays, Loop, Vectorised
from benchmarks._v4_steps import Decode
from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig

DEVICE = "cuda"
# rows that get a block more, and their blocks
Grown = tuple[list[int], list[int]]
# the vectorised form copies these while it builds the others
_FIRST, _SECOND = ("tokens", "offsets", "window"), ("plans", "entries")


class Side(Protocol):
    """One way to prepare a step.

    Attributes:
        waits: whether the host starts when the step before has ended, as it must where the
            numbers of accepted drafts come from it.
        part_us: microseconds of the last step that were spent in NumPy, without copies; of ours, in
            `append_blocks`; 0 where there is neither.
    """

    waits: bool
    part_us: float

    def start(self) -> None: ...
    def stage(self, decode: Decode, grown: Grown) -> None: ...
    def finish(self, decode: Decode) -> None: ...
    def outputs(self) -> dict[str, torch.Tensor]: ...


def device_memory(shape: tuple[int, ...], dtype: str = "int32") -> torch.Tensor:
    """Poisoned memory of the device."""
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
    _gpu.poison(tensor)
    return tensor


def pinned(count: int) -> np.ndarray:
    """int32 [count] in page-locked memory that torch recognises."""
    return torch.empty(count, dtype=torch.int32, pin_memory=DEVICE == "cuda").numpy()


class _HostBuilt:
    """What the two sides that build on the host share: arrays there and on the device."""

    waits = True
    part_us = 0.0

    def __init__(self, config: V4PrepareConfig) -> None:
        self._host = HostArrays(config, pinned)
        groups = {name: device_memory(memory.shape) for name, memory in self._host.groups.items()}
        self._arrays: dict[str, torch.Tensor] = {}
        for group, names in GROUPS.items():
            begin = 0
            for name in names:
                array = self._host.arrays[name]
                part = groups[group][begin : begin + array.size]
                self._arrays[name] = part.view(array.shape)
                begin += array.size
        self._pairs = {
            name: (target, torch.from_numpy(source))
            for name, target, source in [
                *((group, groups[group], self._host.groups[group]) for group in GROUPS),
                *((name, self._arrays[name], self._host.arrays[name]) for name in NAMES),
            ]
        }

    def start(self) -> None:
        """Nothing is kept from step to step."""

    def stage(self, decode: Decode, grown: Grown) -> None:
        """Nothing: the step before may still decide how this one begins."""

    def outputs(self) -> dict[str, torch.Tensor]:
        """The arrays on the device."""
        return self._arrays

    def _copy(self, name: str) -> None:
        """Queue the copy of an array or a group, of the list only what the step has."""
        target, source = self._pairs[name]
        if name in ("entries", "hca_idx"):
            count = self._host.used(name)
            target, source = target[:count], source[:count]
        target.copy_(source, non_blocking=True)


class LoopSide(_HostBuilt):
    """A loop over tokens, then a copy of every array on the current stream."""

    def __init__(self, config: V4PrepareConfig) -> None:
        super().__init__(config)
        self._builder = Loop(config, self._host)

    def finish(self, decode: Decode) -> None:
        """Build and copy."""
        begin = time.perf_counter_ns()
        self._builder.build(*decode.inputs(), decode.block_table)
        self.part_us = (time.perf_counter_ns() - begin) / 1e3
        for name in NAMES:
            self._copy(name)


class VectorisedSide(_HostBuilt):
    """NumPy over all tokens, and five copies in the arrangement of ROCm/ATOM #728.

    The second stream waits for the current one, takes the copies, and the current one waits for
    it. The original makes its other arrays' copies on the current stream; here there are five in
    all, one a group.
    """

    def __init__(self, config: V4PrepareConfig) -> None:
        super().__init__(config)
        self._builder = Vectorised(config, self._host)
        self._stream = torch.cuda.Stream()

    def finish(self, decode: Decode) -> None:
        """Build what is copied first, copy it beside the rest of the building, copy the rest."""
        ctx, q, slot = decode.inputs()
        begin = time.perf_counter_ns()
        self._builder.first(ctx, q, slot)
        middle = time.perf_counter_ns()
        self._begin_copies()
        after = time.perf_counter_ns()
        self._builder.second(ctx, q, decode.block_table)
        end = time.perf_counter_ns()
        self.part_us = (middle - begin + end - after) / 1e3
        self._end_copies()

    def _begin_copies(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for group in _FIRST:
                self._copy(group)

    def _end_copies(self) -> None:
        with torch.cuda.stream(self._stream):
            for group in _SECOND:
                self._copy(group)
        torch.cuda.current_stream().wait_stream(self._stream)


class ArrangementSide(VectorisedSide):
    """The copies and waits of the vectorised side for arrays that the host has ready."""

    waits = False
    _is_built = False

    def start(self) -> None:
        """The next step's arrays are those of all steps."""
        self._is_built = False

    def finish(self, decode: Decode) -> None:
        """Copy."""
        if not self._is_built:
            self._builder.build(*decode.inputs(), decode.block_table)
            self._is_built = True
        self._begin_copies()
        self._end_copies()


class Operators:
    """Small operators of torch on the device, for rows of equally many tokens.

    They make the windows, the places of the tokens' own keys and the offsets of both lists; the
    lists themselves and the plans are left out.
    """

    def __init__(self, config: V4PrepareConfig) -> None:
        self._config = config
        rows, self._tokens = config.max_num_seqs, config.spec_tokens + 1
        self.inputs = device_memory((2, rows))
        self._steps = torch.arange(self._tokens, dtype=torch.int32, device=DEVICE)
        self._window = torch.arange(config.window_size, dtype=torch.int32, device=DEVICE)
        count = config.max_num_tokens + 1
        self._offsets = torch.zeros((2, count), dtype=torch.int32, device=DEVICE)

    def __call__(self) -> dict[str, torch.Tensor]:
        """Arrays of the step whose ctx and slots are in `inputs`."""
        config = self._config
        ctx, slot = self.inputs
        rows, window = config.ring_rows, config.window_size
        positions = (ctx - self._tokens)[:, None] + self._steps
        base = (slot * rows)[:, None]
        low = (positions - (window - 1)).clamp_(min=0)
        at = low[..., None] + self._window
        win_idx = (at % rows).add_(base[..., None]).masked_fill_(at > positions[..., None], -1)
        count = positions + 1
        listed, visible = count // config.hca_ratio, count // config.csa_ratio
        kept = visible.clamp(max=config.index_topk)
        for lengths, out in ((listed, self._offsets[0]), (kept, self._offsets[1])):
            torch.cumsum(lengths.view(-1), 0, dtype=torch.int32, out=out[1:])
        return {
            "positions": positions.view(-1),
            "win_idx": win_idx.view(-1, window),
            "win_len": count.clamp_(max=window).view(-1),
            "swa_write": (positions % rows).add_(base).view(-1),
            "csa_visible": visible.view(-1),
            "hca_indptr": self._offsets[0],
            "csa_indptr": self._offsets[1],
        }


class OperatorsSide:
    """Copies of ctx and the slots, then the operators, one by one or as a captured graph."""

    waits = False
    part_us = 0.0
    # steps that may be queued before a host array is written again
    _TURNS = 4

    def __init__(self, config: V4PrepareConfig, *, in_graph: bool) -> None:
        self._run = Operators(config)
        shape = 2, config.max_num_seqs
        hosts = [pinned(shape[0] * shape[1]).reshape(shape) for _ in range(self._TURNS)]
        self._hosts = [(host, torch.from_numpy(host)) for host in hosts]
        self._turn = 0
        self._out: dict[str, torch.Tensor] = {}
        self._graph = torch.cuda.CUDAGraph() if in_graph else None
        if self._graph is not None:
            self._run.inputs.fill_(config.window_size)
            self._run()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._out = self._run()

    def start(self) -> None:
        """Nothing is kept from step to step."""

    def stage(self, decode: Decode, grown: Grown) -> None:
        """Nothing: the operators are queued with the rest."""

    def finish(self, decode: Decode) -> None:
        """Copy ctx and slots, and run."""
        self._turn = (self._turn + 1) % self._TURNS
        array, host = self._hosts[self._turn]
        array[0], array[1] = decode.ctx, decode.slot
        for target, source in zip(self._run.inputs, host, strict=True):
            target.copy_(source, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._out = self._run()

    def outputs(self) -> dict[str, torch.Tensor]:
        """What the operators made last."""
        return self._out


class Ours:
    """`V4Prepare`; with `whole_table` the host finds the changed cells of the table by itself."""

    waits = False
    part_us = 0.0

    def __init__(self, config: V4PrepareConfig, *, whole_table: bool = False) -> None:
        self.prepare = V4Prepare(config, "gpu:0", allocate=device_memory)
        self._whole_table = whole_table
        self._has_table = False
        self._buffers: Any = None

    def start(self) -> None:
        """The next step brings its whole table, of other blocks."""
        self._has_table = False

    def stage(self, decode: Decode, grown: Grown) -> None:
        """Check the step, pack it and queue its copy."""
        if self._whole_table or not self._has_table:
            self._has_table = True
            self.prepare.stage(*decode.inputs(), decode.block_table)
            return
        begin = time.perf_counter_ns()
        if grown[0]:
            self.prepare.append_blocks(*grown)
        self.part_us = (time.perf_counter_ns() - begin) / 1e3
        self.prepare.stage(*decode.inputs())

    def finish(self, decode: Decode) -> None:
        """Queue the one launch."""
        self._buffers = self.prepare.expand()

    def outputs(self) -> dict[str, torch.Tensor]:
        """The buffers by name."""
        return {name: getattr(self._buffers, name) for name in NAMES}


def check_equal(sides: dict[str, Side], ours: str) -> None:
    """Compare everything that each side made with ours.

    Raises:
        AssertionError: an array differs; side and array are named.
    """
    torch.cuda.synchronize()
    wanted = sides[ours].outputs()
    total = int(wanted["counts"][2])
    for label, side in sides.items():
        for name, array in side.outputs().items():
            end = total if name == "hca_idx" else len(array)
            assert torch.equal(array[:end], wanted[name][:end]), f"{label}: {name}"


def overlap_of(side: Side, decode: Decode, work: _gpu.Call, steps: int) -> dict[str, Any]:
    """How much of each step's copies runs beside the work of the steps; see `summary`.

    Args:
        side: its preparation of each step is queued between two steps' work.
        work: queues the work of one step on the current stream.
        steps: steps that are traced.
    """
    side.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        _run(side, decode, work, steps)
    return summary(events_of(_gpu.trace_events(profiler)), steps)


def _run(side: Side, decode: Decode, work: _gpu.Call, steps: int) -> None:
    """Queue steps, the host one step ahead, and wait for the last one."""
    before = torch.cuda.Event()
    before.record()
    for _ in range(steps):
        grown = decode.advance()
        work()
        side.stage(decode, grown)
        side.finish(decode)
        before.synchronize()
        before = torch.cuda.Event()
        before.record()
    torch.cuda.synchronize()
