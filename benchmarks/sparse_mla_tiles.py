"""Forms of the sparse MLA kernels and numbers of splits: device time of each choice in a graph.

python -m benchmarks.sparse_mla_tiles     # what fd_dsa/ops/sparse_mla/tensor_core.py chooses from

A form that a compiler or the device refuses is left out, and said. So is one that runs and is
WRONG, the chosen one too: the record names it under "wrong".
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks import _gpu
from benchmarks._compiling import compile_all
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
    Form(True, 16, 64, False, 4, 2, 2),
    *(Form(False, 64, n, False, 8, 1, 1) for n in (32, 64)),
    *(Form(True, 64, n, False, 8, s, 1) for n, s in ((64, 2), (32, 3))),
    Form(False, 32, 128, True, 8, 1, 1),
    Form(True, 32, 64, True, 4, 2, 1),
    Form(False, 16, 64, True, 4, 1, 2),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


def forms(heads: int, tokens: int, fp8: bool) -> Iterator[Form]:
    """The chosen form, and others that could serve."""
    chosen = form_for(heads, tokens, fp8)
    yield chosen
    for form in _MANY if heads > 32 else _FEW[fp8]:
        fits = min(heads, 16) <= form.block_h < max(2 * heads, 17)
        if form != chosen and fits and not (fp8 and form.copied):
            yield form


def compile_form(fp8: bool, is_split: bool, form: Form) -> str:
    """Compile a form for Hopper into Triton's cache; returns what the compiler said against it."""
    from fd_dsa.ops.sparse_mla import tensor_core_kernel as kernels
    from fd_dsa.triton_runtime import Pointer

    types = {"slots_ptr": "int32", "cache_ptr": "uint8" if fp8 else "bfloat16"}
    types |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr"), "float32")
    absent = ("out_ptr", "lse_ptr") if is_split else ("partial_ptr", "partial_lse_ptr")
    constants = {"BLOCK_H": form.block_h, "BLOCK_N": form.block_n, "SWAPPED": form.swapped}
    constants |= dict.fromkeys(absent)
    kernel = kernels.attend_copied_kernel if form.copied else kernels.attend_kernel
    if not form.copied:
        constants["FP8"] = fp8
    given = {
        name: Pointer(types.get(name, "bfloat16")) if name.endswith("_ptr") else 7
        for name in kernel.arg_names
        if name not in constants
    }
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages, "capability": 90}
    try:
        kernel.warmup(**given | {"scale_log2": 0.1}, **constants, **options)
    except Exception as error:
        return f"{form}: {str(error)[:100]}"
    return ""


def compile_ahead(sizes: Sequence[tuple[int, int]]) -> None:
    """Compile all candidates of some sizes, a process for each processor."""
    work = {
        (fp8, is_split, form)
        for heads, tokens in sizes
        for fp8 in (True, False)
        for form in forms(heads, tokens, fp8)
        for is_split in (True, False)
    }
    compile_all(compile_form, work)


def candidates(
    ours: Ours, sets: list[Inputs], heads: int, tokens: int
) -> Iterator[tuple[str, list[_gpu.Call]]]:
    """Calls of the choice, of other forms, and of the chosen form with other splits."""
    fp8, rows = sets[0].fp8, len(ours.partials.lse)
    chosen_form = form_for(heads, tokens, fp8)
    for form in forms(heads, tokens, fp8):
        label = CHOSEN if form == chosen_form else "/".join(str(int(x)) for x in form)
        yield label, [ours.call(s, form) for s in sets]
    chosen = num_splits(tokens, heads, TOPK, chosen_form, rows)
    for splits in _SPLITS:
        if splits != chosen and splits * tokens * heads <= 4 * rows:
            yield f"{splits} splits", [ours.call(s, chosen_form, splits) for s in sets]


def usable_sides(
    ours: Ours, sets: list[Inputs], heads: int, tokens: int
) -> tuple[dict[str, list[_gpu.Call]], dict[str, str]]:
    """The candidates that run and are right, and label -> error of those that run and are not."""
    sides, wrong = {}, {}
    for label, calls in candidates(ours, sets, heads, tokens):
        _gpu.poison(ours.out)
        try:
            calls[0]()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{label} left out: {str(error).strip().splitlines()[-1][:100]}", flush=True)
            continue
        off = sets[0].error(ours.out)
        if off < 1e-2:
            sides[label] = calls
        else:
            # as text: JSON has neither NaN nor infinities
            wrong[label] = f"{off:.3g}"
            print(f"{label} is WRONG and left out: error {off:.3g}", flush=True)
    return sides, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all choices; returns 0."""
    args = _gpu.arguments(__doc__, argv)
    register()
    sizes = QUICK if args.quick else SIZES
    compile_ahead(sizes)
    records = record_cache(_SLOTS)
    latents = torch.randn(_SLOTS, RANK + ROPE, device="cuda", dtype=torch.bfloat16)
    all_wrong: dict[str, dict[str, str]] = {}
    with _gpu.Recorder("sparse_mla_tiles", args.out) as record:
        for heads, tokens in sizes:
            for cache in (records, latents):
                fp8 = cache.dtype == torch.uint8
                count = min(8, _gpu.num_sets(tokens * TOPK * (RECORD if fp8 else 1152)))
                sets = [Inputs(cache, random_slots(tokens, _SLOTS), heads) for _ in range(count)]
                ours = Ours(tokens, heads)
                name = f"{heads} heads, {tokens} tokens, {'FP8' if fp8 else 'bf16'}"
                sides, wrong = usable_sides(ours, sets, heads, tokens)
                if wrong:
                    all_wrong[name] = wrong
                    record.note(wrong=all_wrong)
                if not sides:
                    print(f"{name}: no form is left", flush=True)
                    continue
                times = _gpu.interleaved(sides, rounds=7)
                best = sorted(times, key=lambda label: times[label]["p50"])[:3]
                form = form_for(heads, tokens, fp8)
                splits = num_splits(tokens, heads, TOPK, form, len(ours.partials.lse))
                shown = CHOSEN if CHOSEN in times else best[0]
                record.case(name, times, ours=shown, best=best, splits=splits)
                print(f"  best {best}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
