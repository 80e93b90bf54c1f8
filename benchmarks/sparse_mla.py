"""Sparse MLA on tensor cores and FlashMLA: decode steps and chunks of prompts, 2048 keys each.

Both kernels of ours are timed. If that of custom_ops/ is built, the kernel that serves the shape is
compared with the peers. Records of prompts of more than 32 heads are dequantized at the beginning,
which is part of the time. "from records" is the same kernel without that. Every result is compared
with attention in doubles before the timing, and the errors are noted. A side or a case that fails
is named, and the others continue.

Slots are random. Those of decode are in a region of 32 k for each request, of a cache of 2.7 GB.
Those of prefill are in 64 k or 8 k, and in one case neighbouring tokens share nine slots of ten.
The floor is the longest of three times: bytes over the copy bandwidth, GEMMs over the rate of a
large GEMM, and a launch that only reads the selected rows. All are of this run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._sparse_mla_sides import (
    CUDA,
    GATHER,
    OURS,
    RANK,
    RECORD,
    RECORDS,
    ROPE,
    TOPK,
    Inputs,
    Ours,
    overlapping_slots,
    peer_calls,
    random_slots,
    record_cache,
)
from benchmarks.ceilings import matrix_flops_per_s
from fd_dsa.ops.mla.custom_op import kind_for

HEADS = (128, 64, 32, 16, 8)
BATCHES = (1, 8, 32, 64, 128)
CACHE_SLOTS, REGION = 1 << 22, 1 << 15
PREFILL_TOKENS = 4096
# slots that prompts select from -> their number
POOLS = {"64 k": 64 << 10, "8 k": 8 << 10, "overlapping": 64 << 10}
_MOST_SETS = 8
# FlashMLA rounds latents, their scales and weights to bfloat16
_TOLERANCE = 1e-2
_FLOPS_PER_PAIR = 2 * (RANK + ROPE + RANK)


class Comparison:
    """The cases of a number of heads.

    Args:
        record: gets them.
        peers: folder of other projects' kernels.
        flops_per_s: rate of a large GEMM.
        cache: uint8 [slots, 656], records.
        heads: number of attention heads.
    """

    def __init__(
        self, record: _gpu.Recorder, peers: Any, flops_per_s: float, cache: Any, heads: int
    ) -> None:
        self._record, self._peers, self._flops_per_s = record, peers, flops_per_s
        self._cache, self._heads = cache, heads

    def decode(self, batch: int) -> bool:
        """Compare a decode step on FP8 records."""
        sets = []
        for index in range(min(_MOST_SETS, _gpu.num_sets(batch * TOPK * RECORD))):
            first = torch.arange(batch, device="cuda") * REGION + index * 151_552
            slots = random_slots(batch, REGION) + (first % (CACHE_SLOTS - REGION))[:, None].int()
            sets.append(Inputs(self._cache, slots, self._heads))
        return self._compare(f"decode, {self._heads} heads, batch {batch}", "decode", sets, sets)

    def prefill(self, what: str) -> bool:
        """Compare a chunk of a prompt on bfloat16 latents, and on FP8 records."""
        pool, make = POOLS[what], overlapping_slots if what == "overlapping" else random_slots
        slots = make(PREFILL_TOKENS, pool)
        rows = torch.randn(pool, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
        wide = [Inputs(rows, slots, self._heads)]
        narrow = [Inputs(self._cache[:pool], slots, self._heads, is_prompt=True)]
        name = f"prefill, {self._heads} heads, {what}"
        good = self._compare(f"{name}, bf16", "prefill bf16", wide, wide)
        return self._compare(f"{name}, FP8", "prefill FP8", narrow, wide) and good

    def _compare(
        self, name: str, kind: str, sets: Sequence[Inputs], peer_sets: Sequence[Inputs]
    ) -> bool:
        """Check and time all sides. Returns True if ours are right."""
        first, heads, tokens = sets[0], self._heads, len(sets[0].slots)
        ours, peers = Ours(tokens, heads), peer_calls(self._peers, peer_sets, kind == "decode")
        own = {OURS: [ours.call(s) for s in sets]} | ours.cuda_calls(sets)
        sides = peers | own

        def error(label: str) -> float:
            _gpu.poison(ours.out, ours.lse, *ours.partials)
            result = sides[label][0]()
            return first.error(ours.out) if label in own else peer_sets[0].error(result)

        calls, errors, left_out = _gpu.checked(name, sides, error, _TOLERANCE)
        # of our sides that are there, the one that the package serves with
        served_by = kind_for(heads, first.fp8)
        in_cuda = CUDA in calls and served_by is not None and served_by.is_faster(tokens, heads)
        served = CUDA if in_cuda or OURS not in calls else OURS
        if served not in calls:
            return False
        times = _gpu.interleaved({GATHER: [s.gather() for s in sets]} | calls, rounds=15)
        row = RECORD if first.fp8 else 2 * (RANK + ROPE)
        num_bytes = row * min(tokens * TOPK, len(first.cache))
        num_bytes += 2 * tokens * heads * (2 * RANK + ROPE)
        floor_us = max(
            num_bytes / self._record.ceilings["copy_bytes_per_s"] * 1e6,
            tokens * heads * TOPK * _FLOPS_PER_PAIR / self._flops_per_s * 1e6,
            times[GATHER]["p50"],
        )
        notes = {"errors": errors, "left_out": left_out, "heads": heads, "kind": kind}
        self._record.case(name, times, ours=served, floor_us=floor_us, **notes)
        return not {OURS, CUDA, RECORDS} & left_out.keys()


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield cases of decode steps, and pairs of a prompt's chunks."""
    cache, rate = record_cache(CACHE_SLOTS), matrix_flops_per_s()
    record.note(matrix_flops_per_s=rate, topk=TOPK)
    for heads in (64, 16) if args.quick else HEADS:
        comparison = Comparison(record, args.peers, rate, cache, heads)
        for batch in (64,) if args.quick else BATCHES:
            yield f"decode, {heads} heads, batch {batch}", partial(comparison.decode, batch)
        for what in ("64 k",) if args.quick else POOLS:
            yield f"prefill, {heads} heads, {what}", partial(comparison.prefill, what)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Decode steps with and without splits, and chunks of a prompt over both caches."""
    cache = record_cache(1 << 18)
    rows, prompt = torch.randn(1 << 16, RANK + ROPE, device="cuda").bfloat16(), cache[: 1 << 16]
    shapes = [(128, 128, cache), (64, 1, cache), (16, 64, cache), (16, 512, cache)]
    shapes += [(32, 512, cache), (64, 512, prompt)]
    shapes += [(heads, 512, rows) for heads in (64, 16, 32)]
    found: dict[str, tuple[_gpu.Call, list[torch.Tensor]]] = {}
    for heads, tokens, memory in shapes:
        ours, slots = Ours(tokens, heads), random_slots(tokens, len(memory))
        inputs = Inputs(memory, slots, heads, is_prompt=memory is prompt)
        label = f"{tokens} x {heads} heads, {'FP8' if inputs.fp8 else 'bf16'}"
        found[label] = ours.call(inputs), [ours.out, ours.lse]
        for call in ours.cuda_calls([inputs]).get(CUDA, ()):
            found[f"{label}, CUDA C++"] = call, [ours.out, ours.lse]
    return found


main = partial(_gpu.main, "sparse_mla", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
