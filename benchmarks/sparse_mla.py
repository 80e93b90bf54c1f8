"""Sparse MLA on tensor cores beside FlashMLA: decode steps and chunks of prompts, 2048 keys each.

Both kernels of ours are timed; where that of custom_ops/ is built, the one that the package serves
the shape with is compared with the peers. Records of prompts of more than 32 heads are dequantized
first, which is part of the time; "from records" is the same kernel without. Every side's result is
compared with attention in doubles before it is timed; the errors are noted. A side or a case that
fails is named, the others go on. Slots are random: in decode within a region of 32 k for each
request, of a cache of 2.7 GB; in prefill within 64 k or 8 k, and in one case so that neighbouring
tokens share nine slots of ten. The floor is the longest of: bytes over the copy bandwidth, GEMMs
over the rate of a large GEMM, and a launch that only reads the selected rows; all of this run.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

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
PREFILL_TOKENS, POOLS = 4096, (64 << 10, 8 << 10)
_MOST_SETS = 8
# FlashMLA rounds latents, their scales and weights to bfloat16
_TOLERANCE = 1e-2
_FLOPS_PER_PAIR = 2 * (RANK + ROPE + RANK)


def checked(
    name: str,
    sets: list[Inputs],
    ours: Ours,
    peers: dict[str, list[_gpu.Call]],
    peer_inputs: Inputs,
) -> tuple[dict[str, Sequence[_gpu.Call]], dict[str, float], dict[str, str]]:
    """`_gpu.checked` of all sides.

    Args:
        name: of the case.
        sets: inputs of our sides.
        ours: our launches.
        peers: calls of other projects, which return their results.
        peer_inputs: of their first call.
    """
    own = {OURS: [ours.call(s) for s in sets]}
    in_cuda = [call for call in map(ours.cuda_call, sets) if call is not None]
    if in_cuda:
        own[CUDA] = in_cuda
    from_records = [call for call in map(ours.records_call, sets) if call is not None]
    if from_records:
        own[RECORDS] = from_records
    sides = peers | own

    def error(label: str) -> float:
        _gpu.poison(ours.out, ours.lse, *ours.partials)
        result = sides[label][0]()
        return sets[0].error(ours.out) if label in own else peer_inputs.error(result)

    return _gpu.checked(name, sides, error, _TOLERANCE)


def served_by(sets: list[Inputs], calls: Collection[str]) -> str:
    """Which of our sides the package serves a shape with, of those that are there."""
    tokens, heads, _ = sets[0].q.shape
    kind = kind_for(heads, sets[0].fp8)
    in_cuda = CUDA in calls and kind is not None and kind.is_faster(tokens, heads)
    return CUDA if in_cuda or OURS not in calls else OURS


def compare(
    record: _gpu.Recorder,
    peers: Path | None,
    flops_per_s: float,
    name: str,
    kind: str,
    sets: list[Inputs],
    peer_sets: list[Inputs],
) -> bool:
    """Check all sides on the first set, then time them over all sets; whether ours are right."""
    tokens, heads, _ = sets[0].q.shape
    others = peer_calls(peers, peer_sets, kind == "decode")
    calls, errors, left_out = checked(name, sets, Ours(tokens, heads), others, peer_sets[0])
    own = [label for label in (OURS, CUDA) if label in calls]
    if not own:
        return False
    times = _gpu.interleaved({GATHER: [s.gather() for s in sets]} | calls, rounds=15)
    pairs = tokens * heads * TOPK
    row = RECORD if sets[0].fp8 else 2 * (RANK + ROPE)
    num_bytes = 2 * tokens * heads * (2 * RANK + ROPE) + row * min(
        tokens * TOPK, len(sets[0].cache)
    )
    floors = {
        "bytes": num_bytes / record.ceilings["copy_bytes_per_s"] * 1e6,
        "products": pairs * _FLOPS_PER_PAIR / flops_per_s * 1e6,
        "gather": times[GATHER]["p50"],
    }
    served = served_by(sets, own)
    notes = {"errors": errors, "floors_us": floors, "heads": heads, "tokens": tokens, "kind": kind}
    notes["tflops"] = pairs * _FLOPS_PER_PAIR / times[served]["p50"] / 1e6
    notes["left_out"] = left_out
    record.case(name, times, ours=served, floor_us=max(floors.values()), **notes)
    said = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
    print(f"  errors {said}; {notes['tflops']:.0f} TFLOP/s", flush=True)
    return not {OURS, CUDA, RECORDS} & left_out.keys()


def decode(
    record: _gpu.Recorder,
    peers: Path | None,
    rate: float,
    cache: torch.Tensor,
    heads: int,
    batch: int,
) -> bool:
    """One decode step on FP8 records."""
    count = min(_MOST_SETS, _gpu.num_sets(batch * TOPK * RECORD))
    sets = []
    for index in range(count):
        first = torch.arange(batch, device="cuda") * REGION + index * 151_552
        slots = random_slots(batch, REGION) + (first % (CACHE_SLOTS - REGION))[:, None].int()
        sets.append(Inputs(cache, slots, heads))
    name = f"decode, {heads} heads, batch {batch}"
    return compare(record, peers, rate, name, "decode", sets, sets)


def prefill(
    record: _gpu.Recorder,
    peers: Path | None,
    rate: float,
    cache: torch.Tensor,
    heads: int,
    what: str,
) -> bool:
    """A chunk of a prompt, once on bfloat16 latents and once on FP8 records."""
    pool = POOLS[1] if what == "8 k" else POOLS[0]
    make = overlapping_slots if what == "overlapping" else random_slots
    slots = make(PREFILL_TOKENS, pool)
    rows = torch.randn(pool, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    wide = [Inputs(rows, slots, heads)]
    name = f"prefill, {heads} heads, {what}"
    good = compare(record, peers, rate, f"{name}, bf16", "prefill bf16", wide, wide)
    narrow = [Inputs(cache[:pool], slots, heads, is_prompt=True)]
    return compare(record, peers, rate, f"{name}, FP8", "prefill FP8", narrow, wide) and good


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """One decode step each, and pairs of a prompt's chunks."""
    cache, rate = record_cache(CACHE_SLOTS), matrix_flops_per_s()
    record.note(matrix_flops_per_s=rate, topk=TOPK)
    for heads in (64, 16) if args.quick else HEADS:
        shared = record, args.peers, rate, cache, heads
        for batch in (64,) if args.quick else BATCHES:
            name = f"decode, {heads} heads, batch {batch}"
            yield name, partial(decode, *shared, batch)
        for what in ("64 k",) if args.quick else ("64 k", "8 k", "overlapping"):
            yield f"prefill, {heads} heads, {what}", partial(prefill, *shared, what)


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Decode steps with and without splits, and chunks of a prompt over both caches."""
    cache = record_cache(1 << 18)
    rows, prompt = torch.randn(1 << 16, RANK + ROPE, device="cuda").bfloat16(), cache[: 1 << 16]
    found: dict[str, tuple[_gpu.Call, list[torch.Tensor]]] = {}
    for heads, tokens, memory in (
        (128, 128, cache),
        (64, 1, cache),
        (16, 64, cache),
        (16, 512, cache),
        (32, 512, cache),
        (64, 512, prompt),
        (64, 512, rows),
        (16, 512, rows),
        (32, 512, rows),
    ):
        ours = Ours(tokens, heads)
        slots = random_slots(tokens, len(memory))
        inputs = Inputs(memory, slots, heads, is_prompt=memory is prompt)
        label = f"{tokens} x {heads} heads, {'FP8' if inputs.fp8 else 'bf16'}"
        found[label] = ours.call(inputs), [ours.out, ours.lse]
        in_cuda = ours.cuda_call(inputs)
        if in_cuda is not None:
            found[f"{label}, CUDA C++"] = in_cuda, [ours.out, ours.lse]
    return found


main = partial(_gpu.main, "sparse_mla", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
