"""Sparse MLA on tensor cores beside FlashMLA: decode steps and chunks of prompts, 2048 keys each.

Every side's result is compared with attention in doubles before it is timed; the errors are noted.
Slots are random: in decode within a region of 32 k for each request, of a cache of 2.7 GB; in
prefill within 64 k or 8 k, and in one case so that neighbouring tokens share nine slots of ten. The
floor is the longest of: bytes over the copy bandwidth, products over the rate of a large product,
and a launch that only reads the selected rows; all of this run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import _gpu
from benchmarks._sparse_mla_sides import (
    CUDA,
    GATHER,
    OURS,
    RANK,
    RECORD,
    ROPE,
    TOPK,
    Inputs,
    Ours,
    overlapping_slots,
    peer_calls,
    random_slots,
    record_cache,
)
from benchmarks._torch_device import register

HEADS = (128, 64, 32, 16, 8)
WHOLE = (128, 64)
BATCHES = (1, 8, 32, 64, 128)
CACHE_SLOTS, REGION = 1 << 22, 1 << 15
PREFILL_TOKENS, POOLS = 4096, (64 << 10, 8 << 10)
# FlashMLA's time over ours: for all heads of a model, and for a share of them, padded to 64
GATES = {"decode": (0.6, 1.5), "prefill bf16": (0.5, 1.2), "prefill FP8": (0.5, 1.5)}
_MOST_SETS = 8
# FlashMLA rounds latents, their scales and weights to bfloat16
_TOLERANCE = 1e-2
_FLOPS_PER_PAIR = 2 * (RANK + ROPE + RANK)


def matrix_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _gpu.interleaved({"product": [lambda: a @ b]}, mode="events", rounds=10)
    return 2 * 8192**3 / product["product"]["p50"] * 1e6


def compare(
    record: _gpu.Recorder,
    peers: Path | None,
    name: str,
    kind: str,
    sets: list[Inputs],
    peer_sets: list[Inputs],
    flops_per_s: float,
) -> None:
    """Check all sides on the first set, then time them over all sets."""
    tokens, heads, _ = sets[0].q.shape
    ours = Ours(tokens, heads)
    calls: dict[str, list[_gpu.Call]] = {}
    errors = {}
    for label, peer in peer_calls(peers, peer_sets, kind == "decode").items():
        try:
            errors[label] = peer_sets[0].error(peer[0]())
        except RuntimeError as error:
            print(f"{name}: {label} left out: {str(error)[:100]}", flush=True)
            continue
        calls[label] = list(peer)
    calls[GATHER] = [s.gather() for s in sets]
    calls[OURS] = [ours.call(s) for s in sets]
    in_cuda = [call for call in map(ours.cuda_call, sets) if call is not None]
    if in_cuda:
        calls[CUDA] = in_cuda
    for label in (label for label in (OURS, CUDA) if label in calls):
        _gpu.poison(ours.out, ours.lse, *ours.partials)
        calls[label][0]()
        errors[label] = sets[0].error(ours.out)
    assert max(errors.values()) < _TOLERANCE, f"{name}: {errors}"
    times = _gpu.interleaved(calls, rounds=15)
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
    others = {label: t["p50"] for label, t in times.items() if label not in (OURS, CUDA, GATHER)}
    gate = GATES[kind][heads not in WHOLE]
    notes = {"errors": errors, "floors_us": floors, "heads": heads, "tokens": tokens, "kind": kind}
    notes |= {"gate": gate, "ratio_best": min(others.values(), default=0) / times[OURS]["p50"]}
    notes["tflops"] = pairs * _FLOPS_PER_PAIR / times[OURS]["p50"] / 1e6
    record.case(name, times, ours=OURS, floor_us=max(floors.values()), **notes)
    said = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
    print(f"  errors {said}; {notes['tflops']:.0f} TFLOP/s; gate {gate}x", flush=True)


def decode(
    record: _gpu.Recorder,
    peers: Path | None,
    cache: torch.Tensor,
    heads: int,
    batch: int,
    rate: float,
) -> None:
    """One decode step on FP8 records."""
    count = min(_MOST_SETS, _gpu.num_sets(batch * TOPK * RECORD))
    sets = []
    for index in range(count):
        first = torch.arange(batch, device="cuda") * REGION + index * 151_552
        slots = random_slots(batch, REGION) + (first % (CACHE_SLOTS - REGION))[:, None].int()
        sets.append(Inputs(cache, slots, heads))
    compare(record, peers, f"decode, {heads} heads, batch {batch}", "decode", sets, sets, rate)


def prefill(
    record: _gpu.Recorder,
    peers: Path | None,
    cache: torch.Tensor,
    heads: int,
    what: str,
    rate: float,
) -> None:
    """A chunk of a prompt, once on bfloat16 latents and once on FP8 records."""
    pool = POOLS[1] if what == "8 k" else POOLS[0]
    make = overlapping_slots if what == "overlapping" else random_slots
    slots = make(PREFILL_TOKENS, pool)
    rows = torch.randn(pool, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    wide = [Inputs(rows, slots, heads)]
    name = f"prefill, {heads} heads, {what}"
    compare(record, peers, f"{name}, bf16", "prefill bf16", wide, wide, rate)
    narrow = [Inputs(cache[:pool], slots, heads)]
    compare(record, peers, f"{name}, FP8", "prefill FP8", narrow, wide, rate)


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    cache = record_cache(CACHE_SLOTS)
    with _gpu.Recorder("sparse_mla", args.out) as record:
        rate = matrix_rate()
        record.note(matrix_flops_per_s=rate, topk=TOPK)
        for heads in (64, 16) if args.quick else HEADS:
            for batch in (64,) if args.quick else BATCHES:
                decode(record, args.peers, cache, heads, batch, rate)
            for what in ("64 k",) if args.quick else ("64 k", "8 k", "overlapping"):
                prefill(record, args.peers, cache, heads, what, rate)
            torch.cuda.empty_cache()
    return 0


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Decode steps with and without splits, and chunks of a prompt over both caches."""
    register()
    cache = record_cache(1 << 18)
    rows = torch.randn(1 << 16, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    found: dict[str, tuple[_gpu.Call, list[torch.Tensor]]] = {}
    for heads, tokens, memory in (
        (128, 128, cache),
        (64, 1, cache),
        (16, 64, cache),
        (16, 512, cache),
        (64, 512, rows),
        (16, 512, rows),
        (32, 512, rows),
    ):
        ours = Ours(tokens, heads)
        inputs = Inputs(memory, random_slots(tokens, len(memory)), heads)
        form = "FP8" if inputs.fp8 else "bf16"
        found[f"{tokens} x {heads} heads, {form}"] = ours.call(inputs), [ours.out, ours.lse]
    return found


if __name__ == "__main__":
    sys.exit(main())
