"""Sparse MLA on tensor cores: which form serves, into how many splits, and the launches.

Few heads: keys are the rows of the GEMMs, so that no row is padding. Many heads: heads are.
Few tokens: the entries of a token are split among programs until they fill the device. What is
chosen follows from the shapes alone, so a captured graph has it for good and repeats give the
same bits.
"""

from __future__ import annotations

from functools import lru_cache
from math import e, log2, prod
from typing import Any, NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.arrays import allocator_beside, cache_format
from fd_dsa.ops.fixed_order import fixed_order
from fd_dsa.ops.mla.tensor_core_kernel import attend_kernel, combine_kernel
from fd_dsa.ops.mla.tiles import RANK, ROPE
from fd_dsa.ops.split_sums import rows_of_tiles
from fd_dsa.tensor import Tensor

MAX_SPLITS = 32
_HOPPER = range(90, 100)
# multiprocessors of an H100 or H200; elsewhere the splits fit less well
_PROCESSORS = 132
# what a program costs beside its tiles, and a second launch, in tiles
_START_TILES, _COMBINE_TILES = 1.5, 2.0
COMBINE_FORMS = ((4, RANK, 4), (MAX_SPLITS, 128, 4))
"""(max splits, columns of a program, num_warps) of the launch that adds the splits."""


class Form(NamedTuple):
    """How a launch is cut; the choices are those of benchmarks/tune.py.

    Attributes:
        copied: bfloat16 latents are copied to shared memory by the hardware, `num_stages` tiles
            ahead; else keys pass registers, as FP8 records have to.
        block_h, block_n: heads of a program, keys of a tile.
        swapped: keys are the rows of the GEMMs.
        num_warps, num_stages: as of a launch.
        per_processor: programs that a multiprocessor holds.
    """

    copied: bool
    block_h: int
    block_n: int
    swapped: bool
    num_warps: int
    num_stages: int
    per_processor: int


class Partials(NamedTuple):
    """Memory for the results of splits; one launch at a time may use it.

    Attributes:
        values: float32 [rows * 512].
        lse: float32 [rows]; base 2.
    """

    values: Any
    lse: Any


def form_for(num_heads: int, num_tokens: int, fp8: bool) -> Form:
    """The form that was fastest on an H200 for these heads and tokens of a step."""
    if num_heads <= 8:
        return Form(False, 8, 64, True, 4, 1, 2)
    if num_heads <= 16 or num_tokens == 1:
        # one token: many small programs, each with few keys to wait for
        return Form(False, 16, 64, True, 4, 1, 2) if fp8 else Form(True, 16, 64, False, 4, 2, 2)
    if num_heads <= 32 or (fp8 and num_tokens <= 8):
        return Form(not fp8, 32, 128, True, 8, 1, 1)
    return Form(False, 64, 64, False, 8, 1, 1)


def partial_rows(num_heads: int) -> int:
    """Rows of Partials that every number of tokens can do with."""
    few = num_heads <= 16
    return 2 * _PROCESSORS * (2 if few else 1) * min(num_heads, 64)


def new_partials(num_heads: int, allocate: Allocate) -> Partials:
    """Memory for splits; see `partial_rows`."""
    rows = partial_rows(num_heads)
    return Partials(allocate((rows * RANK,), "float32"), allocate((rows,), "float32"))


@lru_cache(maxsize=4096)
def num_splits(num_tokens: int, num_heads: int, topk: int, form: Form, rows: int) -> int:
    """Among how many programs the entries of a token are split.

    The least estimate of: rounds of programs on the device, times the tiles of a program and what
    it costs beside them; and a second launch.

    Args:
        rows: those of the Partials; 0 for none.
    """
    groups, tiles = -(-num_heads // form.block_h), -(-topk // form.block_n)
    at_once = _PROCESSORS * form.per_processor
    most = min(MAX_SPLITS, tiles, rows // (num_tokens * num_heads))

    def estimate(splits: int) -> float:
        rounds = -(-num_tokens * groups * splits // at_once)
        cost = rounds * (-(-tiles // splits) + _START_TILES)
        return cost + (_COMBINE_TILES if splits > 1 else 0)

    return min(range(1, max(1, most) + 1), key=estimate)


def attend_on_tensor_cores(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    partials: Partials | None = None,
    form: Form | None = None,
    splits: int | None = None,
) -> None:
    """Fill `out` with the attention of each token over its slots; see `fd_dsa.ops.sparse_mla`.

    Args:
        q: bfloat16 [num_tokens, num_heads, 576].
        cache: bfloat16 or int16 [..., 576], or uint8 [..., 656], 16-byte aligned.
        slots: -1 (or past the cache) = none, at any place; never read.
        lse: float32 [num_tokens, num_heads] or None; natural logarithm of the sum of the
            exponentials of the scores, -inf where a row names no slot.
        partials: memory for splits; None: nothing is split.
        form, splits: other than those chosen, for benchmarks and tests.

    FP8: latents are rounded to float16 after an exact product of code and scale, the scale to
    float16 before, weights to float16: each within 2^-11. Magnitudes of latents past 65504 become
    infinite, and what is below 2^-25 is lost. bfloat16: weights are rounded to bfloat16, 2^-9.
    Sums are float32.

    Cost: one launch, with splits two; no allocation, no wait.
    """
    fp8 = cache_format(cache).is_fp8
    num_tokens, num_heads, _ = q.shape
    topk = slots.shape[1]
    if num_tokens == 0 or num_heads == 0:
        return
    form = form or form_for(num_heads, rows_of_tiles(num_tokens), fp8)
    rows = 0 if partials is None or fixed_order() else partials.lse.shape[0]
    if splits is None:
        splits = num_splits(num_tokens, num_heads, topk, form, rows)
    is_split = splits > 1
    values, partial_lse = partials if is_split and partials else (None, None)
    groups = -(-num_heads // form.block_h)
    tiles = -(-topk // form.block_n)
    attend_kernel[(num_tokens * groups * splits,)](
        *(q, cache, slots, *((None, None) if is_split else (out, lse)), values, partial_lse),
        *(softmax_scale * log2(e), topk, num_heads, prod(cache.shape[:-1])),
        *(groups, splits, -(-tiles // splits) * form.block_n),
        BLOCK_H=form.block_h,
        BLOCK_N=form.block_n,
        COPIED=form.copied,
        FP8=fp8,
        SWAPPED=form.swapped,
        num_warps=form.num_warps,
        num_stages=form.num_stages,
    )
    if is_split:
        most, columns, num_warps = next(x for x in COMBINE_FORMS if x[0] >= splits)
        combine_kernel[(num_tokens * num_heads, RANK // columns)](
            *(values, partial_lse, out, lse, splits),
            MAX_SPLITS=most,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def why_not(capability: int, dtype: str, cache_dtype: str, rank: int, rope: int) -> str | None:
    """Why attention on tensor cores cannot serve; None if it can.

    Args:
        capability: of the GPU, 90 on Hopper.
        dtype, cache_dtype: of activations, and "float32", "bfloat16" or "fp8_ds_mla".
        rank, rope: values of a latent and of its rotated part.
    """
    if capability not in _HOPPER:
        return f"the GPU is of capability {capability}, tiles are made for 90"
    if dtype != "bfloat16":
        return f"activations are {dtype}, it takes bfloat16"
    if cache_dtype == "float32":
        return "the cache is float32, it takes bfloat16 and fp8_ds_mla"
    if (rank, rope) != (RANK, ROPE):
        return f"latents of {rank} and {rope} values, it takes {RANK} and {ROPE}"
    return None


def attend_slots(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = RANK,
) -> None:
    """`attend_on_tensor_cores` with memory for splits of its own."""
    partials = new_partials(q.shape[1], allocator_beside(q))
    attend_on_tensor_cores(q, cache, slots, out, softmax_scale=softmax_scale, partials=partials)
