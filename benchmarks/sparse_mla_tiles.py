"""Forms of the sparse MLA kernels and numbers of splits: device time of each choice in a graph.

python -m benchmarks.sparse_mla_tiles     # what fd_dsa/ops/sparse_mla/tensor_core.py chooses from

A form that a compiler or the device refuses is left out, and said.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks import _gpu
from benchmarks._sparse_mla_sides import (
    RANK,
    RECORD,
    ROPE,
    TOPK,
    Inputs,
    Ours,
    random_slots,
    record_cache,
)
from benchmarks._torch_device import register
from fd_dsa.ops.sparse_mla.tensor_core import Form, form_for, num_splits

CHOSEN = "chosen"
_SLOTS = 1 << 20
# heads, tokens: decode steps of few and of many requests, and a chunk of a prompt
SIZES = [(h, t) for h in (8, 16, 32, 64, 128) for t in (1, 8, 32, 64, 128, 1024)]
QUICK = [(16, 64), (64, 64)]
_FEW = {
    True: (
        *(Form(False, h, 64, True, 4, 1, 2) for h in (8, 16)),
        *(Form(False, h, 128, True, 8, 1, 1) for h in (8, 16, 32)),
        *(Form(False, h, 64, True, 8, 1, 1) for h in (16, 32)),
        *(Form(False, 16, n, False, 4, 1, p) for n, p in ((32, 2), (64, 1))),
        Form(False, 32, 64, True, 4, 1, 2),
    ),
    False: (
        *(Form(False, h, 64, True, 4, 1, 2) for h in (8, 16)),
        *(Form(False, h, 128, True, 8, 1, 1) for h in (16, 32)),
        *(Form(True, h, 64, True, 4, 2, 1) for h in (16, 32)),
        *(Form(True, h, 128, True, 8, 1, 1) for h in (16, 32)),
        *(Form(True, 16, n, False, 4, s, p) for n, s, p in ((64, 2, 2), (32, 3, 2), (32, 2, 4))),
        Form(False, 32, 64, True, 8, 1, 1),
    ),
}
_MANY = (
    *(Form(False, 64, n, False, 8, 1, 1) for n in (32, 64)),
    *(Form(True, 64, n, False, 8, s, 1) for n, s in ((64, 2), (32, 3))),
    Form(False, 32, 128, True, 8, 1, 1),
    Form(True, 32, 64, True, 4, 2, 1),
    Form(False, 16, 64, True, 4, 1, 2),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


def forms(heads: int, fp8: bool) -> Iterator[Form]:
    """The chosen form, and others that could serve."""
    chosen = form_for(heads)
    yield chosen
    for form in _MANY if heads > 32 else _FEW[fp8]:
        fits = min(heads, 16) <= form.block_h < max(2 * heads, 17)
        if form != chosen and fits and not (fp8 and form.copied):
            yield form


def candidates(
    ours: Ours, sets: list[Inputs], heads: int, tokens: int
) -> Iterator[tuple[str, list[_gpu.Call]]]:
    """Calls of the choice, of other forms, and of the chosen form with other splits."""
    fp8, rows = sets[0].fp8, len(ours.partials.lse)
    for form in forms(heads, fp8):
        label = CHOSEN if form == form_for(heads) else "/".join(str(int(x)) for x in form)
        yield label, [ours.call(s, form) for s in sets]
    form = form_for(heads)
    chosen = num_splits(tokens, heads, TOPK, form, rows)
    for splits in _SPLITS:
        if splits != chosen and splits * tokens * heads <= 4 * rows:
            yield f"{splits} splits", [ours.call(s, form, splits) for s in sets]


def usable(label: str, call: _gpu.Call, ours: Ours, inputs: Inputs) -> bool:
    """Whether a form runs and is right."""
    _gpu.poison(ours.out)
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{label} left out: {str(error).strip().splitlines()[-1][:100]}", flush=True)
        return False
    error = inputs.error(ours.out)
    assert error < 1e-2, f"{label}: error {error}"
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all choices; returns 0."""
    args = _gpu.arguments(__doc__, argv)
    register()
    records = record_cache(_SLOTS)
    latents = torch.randn(_SLOTS, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    with _gpu.Recorder("sparse_mla_tiles", args.out) as record:
        for heads, tokens in QUICK if args.quick else SIZES:
            for cache in (records, latents):
                fp8 = cache.dtype == torch.uint8
                count = min(8, _gpu.num_sets(tokens * TOPK * (RECORD if fp8 else 1152)))
                sets = [Inputs(cache, random_slots(tokens, _SLOTS), heads) for _ in range(count)]
                ours = Ours(tokens, heads)
                sides = {
                    label: calls
                    for label, calls in candidates(ours, sets, heads, tokens)
                    if usable(label, calls[0], ours, sets[0])
                }
                times = _gpu.interleaved(sides, rounds=7)
                best = sorted(times, key=lambda label: times[label]["p50"])[:3]
                splits = num_splits(tokens, heads, TOPK, form_for(heads), len(ours.partials.lse))
                name = f"{heads} heads, {tokens} tokens, {'FP8' if fp8 else 'bf16'}"
                record.case(name, times, ours=CHOSEN, best=best, splits=splits)
                print(f"  best {best}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
