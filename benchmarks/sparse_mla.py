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
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
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
from benchmarks._torch_device import register
from fd_dsa.ops.mla.custom_op import kind_for

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
    """Floating-point operations a second of a large bfloat16 GEMM."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _gpu.interleaved({"product": [lambda: a @ b]}, mode="events", rounds=10)
    return 2 * 8192**3 / product["product"]["p50"] * 1e6


def checked(
    name: str,
    sets: list[Inputs],
    ours: Ours,
    peers: dict[str, list[_gpu.Call]],
    peer_inputs: Inputs,
) -> tuple[dict[str, list[_gpu.Call]], dict[str, float], dict[str, str]]:
    """Sides that give what attention in doubles gives, their errors, and why others are left out.

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
    calls: dict[str, list[_gpu.Call]] = {}
    errors, left_out = {}, {}
    for label, side in (peers | own).items():
        _gpu.poison(ours.out, ours.lse, *ours.partials)
        try:
            result = side[0]()
            # what is wrong with a launch is said by the first wait
            torch.cuda.synchronize()
            is_own = label in own
            errors[label] = sets[0].error(ours.out) if is_own else peer_inputs.error(result)
        except RuntimeError as error:
            left_out[label] = str(error)[:200]
        else:
            if errors[label] < _TOLERANCE:
                calls[label] = side
            else:
                left_out[label] = f"off by {errors[label]:.1e} of attention in doubles"
    for label, why in left_out.items():
        print(f"{name}: {label} left out: {why}", flush=True)
    return calls, errors, left_out


def served_by(sets: list[Inputs], calls: Collection[str]) -> str:
    """Which of our sides the package serves a shape with, of those that are there."""
    tokens, heads, _ = sets[0].q.shape
    kind = kind_for(heads, sets[0].fp8)
    in_cuda = CUDA in calls and kind is not None and kind.is_faster(tokens, heads)
    return CUDA if in_cuda or OURS not in calls else OURS


def compare(
    record: _gpu.Recorder,
    peers: Path | None,
    name: str,
    kind: str,
    sets: list[Inputs],
    peer_sets: list[Inputs],
    flops_per_s: float,
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
    of_peers = [
        t["p50"] for label, t in times.items() if label not in (OURS, CUDA, RECORDS, GATHER)
    ]
    gate = GATES[kind][heads not in WHOLE]
    notes = {"errors": errors, "floors_us": floors, "heads": heads, "tokens": tokens, "kind": kind}
    notes |= {"gate": gate, "ratio_best": min(of_peers, default=0) / times[served]["p50"]}
    notes["tflops"] = pairs * _FLOPS_PER_PAIR / times[served]["p50"] / 1e6
    notes["left_out"] = left_out
    record.case(name, times, ours=served, floor_us=max(floors.values()), **notes)
    said = ", ".join(f"{label} {error:.1e}" for label, error in errors.items())
    print(f"  errors {said}; {notes['tflops']:.0f} TFLOP/s; gate {gate}x", flush=True)
    return not {OURS, CUDA, RECORDS} & left_out.keys()


def decode(
    record: _gpu.Recorder,
    peers: Path | None,
    cache: torch.Tensor,
    heads: int,
    batch: int,
    rate: float,
) -> bool:
    """One decode step on FP8 records."""
    count = min(_MOST_SETS, _gpu.num_sets(batch * TOPK * RECORD))
    sets = []
    for index in range(count):
        first = torch.arange(batch, device="cuda") * REGION + index * 151_552
        slots = random_slots(batch, REGION) + (first % (CACHE_SLOTS - REGION))[:, None].int()
        sets.append(Inputs(cache, slots, heads))
    name = f"decode, {heads} heads, batch {batch}"
    return compare(record, peers, name, "decode", sets, sets, rate)


def prefill(
    record: _gpu.Recorder,
    peers: Path | None,
    cache: torch.Tensor,
    heads: int,
    what: str,
    rate: float,
) -> bool:
    """A chunk of a prompt, once on bfloat16 latents and once on FP8 records."""
    pool = POOLS[1] if what == "8 k" else POOLS[0]
    make = overlapping_slots if what == "overlapping" else random_slots
    slots = make(PREFILL_TOKENS, pool)
    rows = torch.randn(pool, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    wide = [Inputs(rows, slots, heads)]
    name = f"prefill, {heads} heads, {what}"
    good = compare(record, peers, f"{name}, bf16", "prefill bf16", wide, wide, rate)
    narrow = [Inputs(cache[:pool], slots, heads, is_prompt=True)]
    return compare(record, peers, f"{name}, FP8", "prefill FP8", narrow, wide, rate) and good


def cases(quick: bool) -> Iterator[tuple[str, Callable[..., bool], int, Any]]:
    """Name, function, heads and what else it takes of each case or pair of cases."""
    for heads in (64, 16) if quick else HEADS:
        for batch in (64,) if quick else BATCHES:
            yield f"decode, {heads} heads, batch {batch}", decode, heads, batch
        for what in ("64 k",) if quick else ("64 k", "8 k", "overlapping"):
            yield f"prefill, {heads} heads, {what}", prefill, heads, what


def main(argv: Sequence[str] | None = None) -> int:
    """Check and compare; returns the exit status."""
    args = _gpu.arguments(__doc__, argv)
    register()
    cache = record_cache(CACHE_SLOTS)
    with _gpu.Recorder("sparse_mla", args.out) as record:
        rate = matrix_rate()
        record.note(matrix_flops_per_s=rate, topk=TOPK)
        for name, run, heads, what in cases(args.quick):
            case = partial(run, record, args.peers, cache, heads, what, rate)
            record.attempt(name, case)
            torch.cuda.empty_cache()
    return record.status()


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """Decode steps with and without splits, and chunks of a prompt over both caches."""
    register()
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


if __name__ == "__main__":
    sys.exit(main())
