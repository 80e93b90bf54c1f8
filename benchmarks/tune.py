"""Other forms of our kernels beside the ones that serve: device time of each.

    python -m benchmarks.tune                     # all kernels of KERNELS
    python -m benchmarks.tune cache_write ...     # some of them

The numbers of tiles, warps and stages in `fd_dsa` come from these tables. A form that a compiler or
the device refuses is left out, and so is one whose result is wrong; both are named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks import (
    _gpu,
    _v4_steps,
    cache_write,
    indexer_logits,
    indexer_query,
    mla_query,
    overlap,
    step_metadata,
    v4_prepare,
)
from benchmarks import _sparse_mla_sides as sparse
from benchmarks._logits_shapes import Shape
from benchmarks._logits_sides import form_of
from benchmarks._logits_sides import random_cache as random_keys
from benchmarks._torch_device import register
from fd_dsa.ops.indexer_projection import triton_kernel as projection
from fd_dsa.ops.logits.tile_forms import TileForm
from fd_dsa.ops.mla.tensor_core import Form, form_for, num_splits
from fd_dsa.step.checks import StepHints, StepLimits, check_device_counts
from fd_dsa.step.launch import DECODE_TILE, DECODE_WARPS, MIXED_TILE, MIXED_WARPS, StepLaunch
from fd_dsa.step.views import OutputBuffers
from fd_dsa.v4_prepare import V4PrepareConfig
from fd_dsa.v4_prepare.launch import ExpandTiles, tiles_for

CHOSEN = "chosen"
# name, calls by form, the form that serves ("" = several or none)
Case: TypeAlias = tuple[str, Mapping[str, list[_gpu.Call]], str]


def tune_cache_write() -> Iterator[Case]:
    """Tokens of a program, warps and registers."""
    layer, name_of = cache_write.Layer(num_blocks=16384), cache_write.name_of
    for num_tokens in (1, 128, 512, 1024, 2048, 4096, 8192):
        sets = [layer.inputs(num_tokens) for _ in range(_gpu.num_sets(num_tokens * 1700))]
        sides = {
            name_of(how): [layer.one_launch(s, how) for s in sets] for how in cache_write.CANDIDATES
        }
        yield f"{num_tokens} tokens", sides, name_of(cache_write.configuration(num_tokens))


def tune_indexer_query() -> Iterator[Case]:
    """Rows of a program and warps."""
    yield from _queries(
        indexer_query,
        ((1, 64), (32, 64), (128, 64), (512, 64), (1024, 64), (8192, 64), (1024, 32)),
        lambda tokens, heads: indexer_query.configuration(tokens * heads),
    )


def tune_mla_query() -> Iterator[Case]:
    """Rows of a program and warps."""
    shapes = ((1, 128), (8, 128), (32, 128), (128, 128), (1024, 128), (8192, 128), (1, 16))
    yield from _queries(mla_query, (*shapes, (128, 16)), lambda *_: mla_query.CHOSEN)


def _queries(module: Any, shapes: Any, chosen: Callable[[int, int], tuple[int, int]]) -> Any:
    """Cases of a kernel that prepares queries."""
    cos_sin = module.angles()
    for tokens, heads in shapes:
        sets = module.sets_of(tokens, heads)
        sides = {
            f"{r} x {w}": [s.one_launch(cos_sin, (r, w)) for s in sets]
            for r, w in module.CANDIDATES
        }
        yield f"{tokens} tokens x {heads} heads", sides, "{} x {}".format(*chosen(tokens, heads))


def _tiling(tiling: projection.Tiling) -> str:
    return "{} x {} x {} / {}, {} warps, {} stages".format(*tiling)


def tune_projections() -> Iterator[Case]:
    """Tilings of `project_indexer`; around the limit of split sums, all."""
    layer = overlap.Layer(overlap.Sizes())
    copies, limit = overlap.copies_of(layer.weights), projection.MOST_SPLIT_TOKENS
    for tokens in (1, 16, 32, 64, 128, 256, 512, 1024, 2048):
        x, out = overlap.inputs(tokens, layer.sizes)
        tried = projection.CANDIDATES if tokens <= 2 * limit else projection.WHOLE
        sides = {
            _tiling(tiling): [overlap.launch(x, both, out, tiling) for both in copies]
            for tiling in (projection.SPLIT if tokens < limit else tried)
        }
        yield f"{tokens} tokens", sides, _tiling(projection.configuration(tokens))


def tune_step_metadata() -> Iterator[Case]:
    """Lanes and warps of a program of the step kernel."""
    module = step_metadata
    sizes = module.MAX_NUM_SEQS, module.MAX_NUM_TOKENS, module.MAX_BLOCKS, module.BLOCK_SIZE
    limits = StepLimits(*sizes, None)
    buffers = OutputBuffers(limits, module.allocate, False)
    decode = {f"decode {batch}": module.decode_rows(batch) for batch in module.DECODE_BATCHES}
    forms = {
        "decode": ((32, 1), (64, 1), (64, 2), (128, 4), (256, 8)),
        "mixed": ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8), (256, 8)),
    }
    chosen = {"decode": (DECODE_TILE, DECODE_WARPS), "mixed": (MIXED_TILE, MIXED_WARPS)}
    for label, rows in (decode | module.PREFILL_STEPS).items():
        step = module.make_step(rows, 0)
        counts = check_device_counts(limits, StepHints(*step.counts.values()))
        kind = "mixed" if counts.num_prefill_tokens > 0 else "decode"
        sides = {
            "{} x {}".format(*form): [
                partial(StepLaunch(limits, buffers, **{kind: form}), step.tensors, counts)
            ]
            for form in forms[kind]
        }
        yield label, sides, "{} x {}".format(*chosen[kind])


# of the V4 expansion; each is tried with the others as chosen
_V4_TRIED = {
    "num_warps": (1, 2, 4, 8),
    "hca_tile": (128, 256, 512, 1024, 2048),
    "window_rows": (1, 2, 4),
    "hca_group": (1, 2, 4),
    "row_tile": (32, 64, 128, 256, 512),
}


def _v4_tiles(config: V4PrepareConfig) -> Iterator[tuple[str, ExpandTiles]]:
    """The cut into programs that the package chooses, and cuts that differ in one number."""
    chosen = tiles_for(config)
    yield CHOSEN, chosen
    entries, tokens = config.max_model_len // config.hca_ratio, config.max_tokens_per_seq
    for name, value in ((name, value) for name, values in _V4_TRIED.items() for value in values):
        tiles = replace(chosen, **{name: value})
        # tiles of one shape get one layout, and that of the rows does not fit unaligned lists
        if tiles == chosen or tiles.row_tile == tiles.hca_tile:
            continue
        # as many programs as there are rounds
        items = -(-entries // tiles.hca_tile) * -(-tokens // tiles.hca_group)
        windows = -(-tokens // tiles.window_rows)
        yield f"{name} {value}", replace(tiles, hca_parts=min(items, 8), window_parts=windows)


def tune_v4_prepare() -> Iterator[Case]:
    """How the V4 expansion is cut into programs."""
    for sizes in ((1, 8192, 1), (32, 8192, 3), (128, 8192, 1), (256, 131072, 3)):
        size = _v4_steps.Size(*sizes)
        config = _v4_steps.config_of(size.batch, size.drafts)
        decode = _v4_steps.Decode(config, size.context)
        count = min(8, _gpu.num_sets(v4_prepare.least_bytes(config, decode)))
        sides = {
            label: v4_prepare.Launches(config, decode, count, tiles).calls
            for label, tiles in _v4_tiles(config)
        }
        yield size.label, sides, CHOSEN


# registers of a thread -> blocks of four warps that a processor then has
_BLOCKS = {255: 2, 168: 3, 128: 4, 96: 5}


def tile_forms(shape: Shape) -> dict[str, TileForm]:
    """The form that scores a shape, and forms that differ from it in one thing; none twice."""
    chosen = form_of(shape)
    forms = {CHOSEN: chosen}
    for registers, blocks in _BLOCKS.items():
        form = replace(chosen, maxnreg=registers, programs_per_processor=blocks)
        forms[f"{registers} registers"] = form
    forms |= {f"{n} stages": replace(chosen, num_stages=n) for n in (2, 4, 5)}
    forms |= {f"{n} programs": replace(chosen, programs_per_processor=n) for n in (1, 2, 8)}
    first, half = chosen.first_tokens, max(chosen.first_tokens // 2, 1)
    for tokens in ((first, 0), (first, first), (2 * first, 0), (half, half)):
        for registers in (255, 168):
            form = TileForm(*tokens, maxnreg=registers, programs_per_processor=_BLOCKS[registers])
            forms[f"{tokens[0]} + {tokens[1]} tokens, {registers} registers"] = form
    names = {form: label for label, form in reversed(forms.items())}
    return {label: form for label, form in forms.items() if names[form] == label}


def tune_indexer_logits() -> Iterator[Case]:
    """Tokens, registers and pages in flight of the indexer's tile kernel."""
    chosen = [Shape(h, 1, keys << 10, 2048, True) for h in (64, 32) for keys in (8, 32)]
    chosen += [Shape(64, 1, 4 << 10), Shape(64, 1, 128 << 10), Shape(64, 32, 4 << 10)]
    chosen += [Shape(64, 64, 32 << 10, new) for new in (1, 2, 3, 4)] + [Shape(32, 64, 32 << 10)]
    cache, logits = random_keys(), indexer_logits.scores_for(chosen)
    for shape in chosen:
        steps = indexer_logits.steps_of(shape, cache, logits)
        first, sides = steps[0], {}
        for label, form in tile_forms(shape).items():
            if _is_right(label, first.ours(form), first, first.logits, indexer_logits.TOLERANCE):
                sides[label] = [step.ours(form) for step in steps]
        yield shape.label, sides, CHOSEN


_FEW_HEADS = {
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
_MANY_HEADS = (
    Form(True, 16, 64, False, 4, 2, 2),
    *(Form(False, 64, n, False, 8, 1, 1) for n in (32, 64)),
    *(Form(True, 64, n, False, 8, s, 1) for n, s in ((64, 2), (32, 3))),
    Form(False, 32, 128, True, 8, 1, 1),
    Form(True, 32, 64, True, 4, 2, 1),
    Form(False, 16, 64, True, 4, 1, 2),
)


def _sparse_mla_sides(
    ours: sparse.Ours, sets: list[sparse.Inputs], heads: int, tokens: int
) -> Iterator[tuple[str, list[_gpu.Call]]]:
    """Calls of the choice, of other forms, and of the chosen form with other splits."""
    fp8, rows = sets[0].fp8, len(ours.partials.lse)
    chosen = form_for(heads, tokens, fp8)
    yield CHOSEN, [ours.call(s, chosen) for s in sets]
    for form in _MANY_HEADS if heads > 32 else _FEW_HEADS[fp8]:
        fits = min(heads, 16) <= form.block_h < max(2 * heads, 17)
        if form != chosen and fits and not (fp8 and form.copied):
            yield "/".join(str(int(x)) for x in form), [ours.call(s, form) for s in sets]
    splits_now = num_splits(tokens, heads, sparse.TOPK, chosen, rows)
    for splits in (1, 2, 3, 4, 6, 8, 12, 16, 32):
        if splits != splits_now and splits * tokens * heads <= 4 * rows:
            yield f"{splits} splits", [ours.call(s, chosen, splits) for s in sets]


def tune_sparse_mla() -> Iterator[Case]:
    """Forms of the sparse MLA kernels and numbers of splits."""
    records = sparse.record_cache(1 << 20)
    width = sparse.RANK + sparse.ROPE
    latents = torch.randn(1 << 20, width, device="cuda", dtype=torch.bfloat16)
    for heads, tokens in ((h, t) for h in (8, 16, 32, 64, 128) for t in (1, 8, 32, 64, 128, 1024)):
        for cache in (records, latents):
            count = min(8, _gpu.num_sets(tokens * sparse.TOPK * cache[0].nbytes))
            slots = [sparse.random_slots(tokens, len(cache)) for _ in range(count)]
            sets = [sparse.Inputs(cache, s, heads) for s in slots]
            ours = sparse.Ours(tokens, heads)
            sides = {
                label: calls
                for label, calls in _sparse_mla_sides(ours, sets, heads, tokens)
                if _is_right(label, calls[0], sets[0], ours.out, 1e-2)
            }
            kind = "FP8" if sets[0].fp8 else "bf16"
            yield f"{heads} heads, {tokens} tokens, {kind}", sides, CHOSEN


def _is_right(label: str, call: _gpu.Call, inputs: Any, out: torch.Tensor, most: float) -> bool:
    """Whether a form runs and its error is at most `most`; says why not."""
    _gpu.poison(out)
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{label} left out: {str(error).strip().splitlines()[-1][:100]}", flush=True)
        return False
    error = inputs.error(out)
    if not error <= most:
        print(f"{label} is WRONG and left out: error {error:.3g}", flush=True)
    return error <= most


KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    "cache_write": tune_cache_write,
    "indexer_query": tune_indexer_query,
    "mla_query": tune_mla_query,
    "projections": tune_projections,
    "step_metadata": tune_step_metadata,
    "v4_prepare": tune_v4_prepare,
    "indexer_logits": tune_indexer_logits,
    "sparse_mla": tune_sparse_mla,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the times of all forms of the kernels that are named; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    kernels = parser.parse_args(argv).kernels
    unknown = [name for name in kernels if name not in KERNELS]
    if unknown:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(KERNELS)}")
    register()
    for kernel in kernels or KERNELS:
        for name, sides, chosen in KERNELS[kernel]():
            times = _gpu.interleaved(dict(sides), rounds=10) if sides else {}
            us = {label: time["p50"] for label, time in times.items()}
            best = sorted(us, key=us.__getitem__)[:3]
            line = "  ".join(f"{label}: {value:.2f}" for label, value in us.items())
            print(f"{kernel}, {name}: best {best}, serves {chosen or '-'}:  {line}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
