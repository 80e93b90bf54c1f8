"""The sides of the V4 preparation on torch tensors: the work of each for one decode step.

`start` begins a sequence of steps. `stage` takes a step, and may run while the device works on the
step before. `finish` queues the rest on the current stream. Only our side has work for `stage`.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks import _gpu
from benchmarks._v4_baselines import GROUPS, NAMES, HostArrays, Vectorised
from benchmarks._v4_steps import Decode
from fd_dsa.v4_prepare import V4Prepare, V4PrepareConfig

DEVICE = "cuda"
# rows that get a block more, and their blocks
Grown = tuple[list[int], list[int]]


class Side:
    """A way to prepare a step.

    Attributes:
        waits: True if the host starts at the end of the step before, because the numbers of
            accepted drafts come from it.
        part_us: microseconds of the last step in NumPy, without copies; for ours, in `set_blocks`.
            0 without either.
        made: outputs of the last step by name.
    """

    waits = False
    part_us = 0.0
    made: dict[str, torch.Tensor]

    def start(self) -> None:
        """Begin a sequence of steps."""

    def stage(self, decode: Decode, grown: Grown) -> None:
        """Do the work that may run alongside the step before."""

    def finish(self, decode: Decode) -> None:
        """Queue the rest."""
        raise NotImplementedError


def device_memory(shape: tuple[int, ...], dtype: str = "int32") -> torch.Tensor:
    """Return poisoned memory of the device."""
    tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
    _gpu.poison(tensor)
    return tensor


def pinned(count: int) -> np.ndarray:
    """Return int32 [count] in page-locked memory that torch recognises."""
    return torch.empty(count, dtype=torch.int32, pin_memory=DEVICE == "cuda").numpy()


class VectorisedSide(Side):
    """NumPy over all tokens, and five copies in the arrangement of ROCm/ATOM #728.

    The second stream waits for the current one, takes the copies, and the current one waits for
    it. The original makes its other arrays' copies on the current stream; here there are five in
    all, one a group. Three are queued while the host builds the others.
    """

    waits = True

    def __init__(self, config: V4PrepareConfig) -> None:
        self._host = HostArrays(config, pinned)
        self._builder = Vectorised(config, self._host)
        self._stream = torch.cuda.Stream()
        self._groups, self.made = {}, {}
        for group, names in GROUPS.items():
            memory = self._groups[group] = device_memory(self._host.groups[group].shape)
            arrays = [self._host.arrays[name] for name in names]
            for name, array, part in zip(
                names, arrays, memory.split([array.size for array in arrays]), strict=True
            ):
                self.made[name] = part.view(array.shape)

    def finish(self, decode: Decode) -> None:
        """Build what is copied first, copy it beside the rest of the building, copy the rest."""
        ctx, q, slot = decode.inputs()
        begin = time.perf_counter_ns()
        self._builder.first(ctx, q, slot)
        middle = time.perf_counter_ns()
        self._stream.wait_stream(torch.cuda.current_stream())
        self._copy("tokens", "offsets", "window")
        after = time.perf_counter_ns()
        self._builder.second(ctx, q, decode.block_table)
        self.part_us = (middle - begin + time.perf_counter_ns() - after) / 1e3
        self._copy("plans", "entries")
        torch.cuda.current_stream().wait_stream(self._stream)

    def _copy(self, *groups: str) -> None:
        """Queue the copies of groups on the second stream, of the list only what the step has."""
        with torch.cuda.stream(self._stream):
            for group in groups:
                count = self._host.used(group)
                source = torch.from_numpy(self._host.groups[group][:count])
                self._groups[group][:count].copy_(source, non_blocking=True)


class Operators:
    """Small operators of torch on the device, for rows of equally many tokens.

    They make the windows, the places of the tokens' own keys and the offsets of both lists. The
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
        """Return arrays of the step whose ctx and slots are in `inputs`."""
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


class OperatorsSide(Side):
    """Copies of ctx and the slots, then the operators, one by one or as a captured graph."""

    # steps that may be queued before a host array is written again
    _TURNS = 4

    def __init__(self, config: V4PrepareConfig, *, in_graph: bool) -> None:
        self._run = Operators(config)
        shape = 2, config.max_num_seqs
        self._hosts = [pinned(shape[0] * shape[1]).reshape(shape) for _ in range(self._TURNS)]
        self._turn = 0
        self._graph = torch.cuda.CUDAGraph() if in_graph else None
        if self._graph is not None:
            self._run.inputs.fill_(config.window_size)
            self._run()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self.made = self._run()

    def finish(self, decode: Decode) -> None:
        """Copy ctx and slots, and run."""
        self._turn = (self._turn + 1) % self._TURNS
        host = self._hosts[self._turn]
        host[0], host[1] = decode.ctx, decode.slot
        for target, source in zip(self._run.inputs, torch.from_numpy(host), strict=True):
            target.copy_(source, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self.made = self._run()


class Ours(Side):
    """`V4Prepare` itself.

    With `whole_table` the host finds the changed cells of the table.
    """

    def __init__(self, config: V4PrepareConfig, *, whole_table: bool = False) -> None:
        self.prepare = V4Prepare(config, "gpu:0", allocate=device_memory)
        self.made = {name: getattr(self.prepare.buffers, name) for name in NAMES}
        self._whole_table, self._has_table = whole_table, False

    def start(self) -> None:
        """Begin with a new table. The next step brings all of its blocks."""
        self._has_table = False

    def stage(self, decode: Decode, grown: Grown) -> None:
        """Check the step, pack it and queue its copy."""
        if self._whole_table or not self._has_table:
            self._has_table = True
            self.prepare.stage(*decode.inputs(), decode.block_table)
            return
        begin = time.perf_counter_ns()
        for row, block in zip(*grown, strict=True):
            # the context has grown already: the new block is the last that it needs
            count = -(-int(decode.ctx[row]) // self.prepare.cfg.block_size)
            self.prepare.set_blocks(row, [block], count - 1)
        self.part_us = (time.perf_counter_ns() - begin) / 1e3
        self.prepare.stage(*decode.inputs())

    def finish(self, decode: Decode) -> None:
        """Queue the one launch."""
        self.prepare.expand()


def check_equal(sides: dict[str, Side], ours: str) -> None:
    """Compare everything that each side made with ours.

    Raises:
        AssertionError: an array differs; side and array are named.
    """
    torch.cuda.synchronize()
    wanted = sides[ours].made
    total = int(wanted["counts"][2])
    for label, side in sides.items():
        for name, array in side.made.items():
            end = total if name == "hca_idx" else len(array)
            assert torch.equal(array[:end], wanted[name][:end]), f"{label}: {name}"
