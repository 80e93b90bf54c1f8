"""Sparse MLA on tensor cores: tile sizes, splits and launches, and the choice of a kernel.

With few heads the rows of the GEMMs are keys, so that no row is padding. With many heads they are
heads. With few tokens the entries of a token are split among programs until they fill the device.
All sizes depend only on shapes, so a captured graph stays valid and repeats give the same bits.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from math import e, log2, prod
from typing import Any, NamedTuple

from fd_dsa.device.allocation import Allocate
from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops.arrays import allocator_beside, cache_format
from fd_dsa.ops.fixed_order import fixed_order, row_dependence_refusal
from fd_dsa.ops.library_kernel import difference, interpreter_refusal
from fd_dsa.ops.mla.custom_op import MIN_WIDE_HEADS, CustomAttention, kind_for
from fd_dsa.ops.mla.records import Dequantized, DequantizedRecords
from fd_dsa.ops.mla.tensor_core_kernel import attend_kernel, combine_kernel
from fd_dsa.ops.mla.tiles import RANK, ROPE
from fd_dsa.ops.providers import CUSTOM_OP, TENSOR_CORE, SelectedProvider, select_provider
from fd_dsa.ops.split_sums import PROCESSORS, rows_of_tiles
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor

logger = logging.getLogger(__name__)
MAX_SPLITS = 32
# with fewer prompt tokens in a step, a launch that dequantizes costs more than it saves
_MIN_PREFILL_TOKENS = 256
_HOPPER = range(90, 100)
# cost of a program in addition to its tiles, and of a second launch, in tiles
_START_TILES, _COMBINE_TILES = 1.5, 2.0
COMBINE_CONFIGS = ((4, RANK, 4), (MAX_SPLITS, 128, 4))
"""(max splits, columns of a program, num_warps) of the launch that combines the splits."""


class KernelConfig(NamedTuple):
    """Tile sizes of a launch, tuned by benchmarks/tune.py.

    Attributes:
        copied: True if the hardware copies bfloat16 latents to shared memory, `num_stages` tiles
            ahead. Otherwise keys pass through registers, as FP8 records must.
        block_h: heads of a program.
        block_n: keys of a tile.
        swapped: True if the rows of the GEMMs are keys.
        num_warps, num_stages: options of the launch.
        per_processor: programs that fit a multiprocessor.
    """

    copied: bool
    block_h: int
    block_n: int
    swapped: bool
    num_warps: int
    num_stages: int
    per_processor: int


class Partials(NamedTuple):
    """Memory for the partial results of splits, used by one launch at a time.

    Attributes:
        values: float32 [rows * width], of a token, head and split. DeepSeek-V4 writes none for a
            split without a key.
        lse: float32 [rows], logarithm of the sum of exponentials, -inf without a key. Its base is
            2, and e for DeepSeek-V4.
    """

    values: Any
    lse: Any


@lru_cache(maxsize=4096)
def kernel_config(num_heads: int, num_tokens: int, fp8: bool) -> KernelConfig:
    """Return the tile sizes that were fastest on an H200 for these heads and tokens."""
    if num_heads <= 8:
        return KernelConfig(False, 8, 64, True, 4, 1, 2)
    if num_heads <= 16 or num_tokens == 1:
        # one token: many small programs, each of which waits for few keys
        return (
            KernelConfig(False, 16, 64, True, 4, 1, 2)
            if fp8
            else KernelConfig(True, 16, 64, False, 4, 2, 2)
        )
    if num_heads <= 32 or (fp8 and num_tokens <= 8):
        return KernelConfig(not fp8, 32, 128, True, 8, 1, 1)
    return KernelConfig(False, 64, 64, False, 8, 1, 1)


def partial_rows(num_heads: int) -> int:
    """Return the rows of Partials that suffice for every number of tokens."""
    few = num_heads <= 16
    return 2 * PROCESSORS * (2 if few else 1) * min(num_heads, 64)


def new_partials(num_heads: int, allocate: Allocate) -> Partials:
    """Allocate memory for splits, see `partial_rows`."""
    rows = partial_rows(num_heads)
    return Partials(allocate((rows * RANK,), "float32"), allocate((rows,), "float32"))


@lru_cache(maxsize=4096)
def num_splits(num_tokens: int, num_heads: int, topk: int, config: KernelConfig, rows: int) -> int:
    """Return the number of programs that share the entries of a token.

    It minimises the estimated time: rounds of programs on the device times the cost of a program,
    plus a second launch.

    Args:
        num_tokens, num_heads, topk: shape of the step.
        config: tile sizes.
        rows: rows of the Partials, 0 without.
    """
    groups, tiles = -(-num_heads // config.block_h), -(-topk // config.block_n)
    at_once = PROCESSORS * config.per_processor
    limit = min(MAX_SPLITS, tiles, rows // (num_tokens * num_heads))

    def estimate(splits: int) -> float:
        rounds = -(-num_tokens * groups * splits // at_once)
        cost = rounds * (-(-tiles // splits) + _START_TILES)
        return cost + (_COMBINE_TILES if splits > 1 else 0)

    return min(range(1, max(1, limit) + 1), key=estimate)


def attend_on_tensor_cores(
    q: Tensor,
    cache: Tensor,
    slots: Tensor,
    out: Tensor,
    *,
    softmax_scale: float,
    lse: Tensor | None = None,
    partials: Partials | None = None,
    config: KernelConfig | None = None,
    splits: int | None = None,
) -> None:
    """Attend to the slots of each token's row, as `fd_dsa.ops.sparse_mla`, to `out`.

    Rounding with FP8 records: a scale is rounded to float16, its exact product with a code to
    float16, and a weight to float16, each within 2^-11. Latents past 65504 become infinite, and
    latents below 2^-25 become 0. With bfloat16 latents weights are rounded to bfloat16, within
    2^-9. Sums are float32.

    Args:
        q: bfloat16 [num_tokens, num_heads, 576].
        cache: bfloat16 or int16 [..., 576], or uint8 [..., 656], 16-byte aligned.
        slots: int32 [num_tokens, topk]. Entries of -1 or past the cache are ignored at any place.
        out: [num_tokens, num_heads, 512], float32 or bfloat16.
        softmax_scale: factor of the scores.
        lse: float32 [num_tokens, num_heads], natural logarithm of the sum of the exponentials of
            the scores, -inf for a row without a slot; None = not written.
        partials: memory for splits; None = no splits.
        config, splits: tile sizes and splits of benchmarks and tests; None = the tuned ones.

    Cost: one launch, or two with splits, without an allocation or a wait.
    """
    fp8 = cache_format(cache).is_fp8
    num_tokens, num_heads, _ = q.shape
    topk = slots.shape[1]
    if num_tokens == 0 or num_heads == 0:
        return
    config = config or kernel_config(num_heads, rows_of_tiles(num_tokens), fp8)
    rows = 0 if partials is None or fixed_order() else partials.lse.shape[0]
    if splits is None:
        splits = num_splits(num_tokens, num_heads, topk, config, rows)
    is_split = splits > 1
    values, partial_lse = partials if is_split and partials else (None, None)
    groups = -(-num_heads // config.block_h)
    tiles = -(-topk // config.block_n)
    attend_kernel[(num_tokens * groups * splits,)](
        *(q, cache, slots, *((None, None) if is_split else (out, lse)), values, partial_lse),
        *(softmax_scale * log2(e), topk, num_heads, prod(cache.shape[:-1])),
        *(groups, splits, -(-tiles // splits) * config.block_n),
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        COPIED=config.copied,
        FP8=fp8,
        SWAPPED=config.swapped,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if is_split:
        max_splits, columns, num_warps = next(x for x in COMBINE_CONFIGS if x[0] >= splits)
        combine_kernel[(num_tokens * num_heads, RANK // columns)](
            *(values, partial_lse, out, lse, splits),
            MAX_SPLITS=max_splits,
            COLUMNS=columns,
            num_warps=num_warps,
        )


def unsupported_reason(
    capability: int, dtype: str, cache_dtype: str, rank: int, rope: int
) -> str | None:
    """Return the reason why attention on tensor cores is unsupported, or None.

    Args:
        capability: compute capability of the GPU, 90 on Hopper.
        dtype: dtype of activations.
        cache_dtype: "float32", "bfloat16" or "fp8_ds_mla".
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
    """Attend by `attend_on_tensor_cores`, with new memory for splits."""
    partials = new_partials(q.shape[1], allocator_beside(q))
    attend_on_tensor_cores(q, cache, slots, out, softmax_scale=softmax_scale, partials=partials)


def select_attention(
    kind: str,
    num_heads: int,
    dtype: str,
    cache_dtype: str,
    rank: int,
    rope: int,
    capability: int,
    allocate: Allocate,
) -> SelectedProvider:
    """Select the provider of sparse MLA for sizes and types, see `unsupported_reason`.

    The first call compares a kernel of custom_ops/ with the definition, and waits for the device.
    """
    reason = unsupported_reason(capability, dtype, cache_dtype, rank, rope)
    conditions, own = {TENSOR_CORE: reason}, kind_for(num_heads, cache_dtype == "fp8_ds_mla")
    conditions[CUSTOM_OP] = reason or row_dependence_refusal() or interpreter_refusal()
    if own is None:
        few = f"{num_heads} heads over bfloat16 latents, it takes more than {MIN_WIDE_HEADS - 1}"
        conditions[CUSTOM_OP] = conditions[CUSTOM_OP] or few
    return select_provider("sparse_mla", kind, conditions, lambda k: difference(own, k, allocate))


class TensorCoreAttention:
    """Sparse MLA on tensor cores, with memory that all layers and steps share.

    A kernel of custom_ops/ attends if it is faster for this number of tokens. It supports few heads
    over FP8 records, and more than 32 heads. With more than 32 heads over FP8 records, the records
    of prompts are dequantized first if that is faster.

    Args:
        num_heads: number of heads of the queries.
        softmax_scale: factor of the scores.
        custom: kernel of custom_ops/ for these heads and this cache.
        always_custom: True if Triton's kernel cannot be compiled.
        records: memory for dequantized records, free during `attend`.
    """

    def __init__(
        self,
        num_heads: int,
        softmax_scale: float,
        allocate: Allocate,
        custom: CustomAttention | None = None,
        always_custom: bool = False,
        records: DequantizedRecords | None = None,
    ) -> None:
        self._scale, self._custom, self._always = softmax_scale, custom, always_custom
        self._partials = None
        if custom is None or not (always_custom or custom.is_faster(1, num_heads)):
            self._partials = new_partials(num_heads, allocate)
        reads_them = custom is not None and not custom.records_alone
        self._records = records if reads_them else None

    def attend(
        self,
        q: Tensor,
        cache: Tensor,
        slots: Tensor,
        out: Tensor,
        lse: Tensor | None = None,
        step: ForwardMeta | None = None,
    ) -> None:
        """Attend to the slots of each token, see `attend_on_tensor_cores`.

        Args:
            step: step of the tokens, whose slots are then all in their own rows.
        """
        how: dict[str, Any] = {"softmax_scale": self._scale, "lse": lse}
        custom = self._custom
        if custom is not None and (self._always or custom.is_faster(q.shape[0], q.shape[1])):
            dequantized = self._dequantized(cache, step)
            custom(q, cache, slots, out, dequantized=dequantized, **how)
        else:
            attend_on_tensor_cores(q, cache, slots, out, partials=self._partials, **how)

    def _dequantized(self, cache: Tensor, step: ForwardMeta | None) -> Dequantized | None:
        """Dequantize the records of the step's prompts, or return None if that does not pay."""
        if self._records is None or step is None:
            return None
        if step.num_prefill_tokens < _MIN_PREFILL_TOKENS or not cache_format(cache).is_fp8:
            return None
        try:
            return self._records.fill(cache, step)
        except KernelUnavailable as error:
            self._records = None
            logger.warning("attention of prompts: no records are dequantized first (%s)", error)
            return None
