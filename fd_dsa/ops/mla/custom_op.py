"""Sparse MLA by the CUDA C++ kernels of custom_ops/, through their C ABI.

The arguments and results are those of `attend_on_tensor_cores`. Few heads over FP8 records: codes
of latents are exact in float16, and scales stay float32 up to the weights, which are float16:
within 2^-11. Blocks of 64 heads: rounded where `attend_on_tensor_cores` says.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from math import prod
from typing import Any, ClassVar

from fd_dsa import custom_ops
from fd_dsa.cache_formats import LATENT_WIDTH
from fd_dsa.device.allocation import Allocate
from fd_dsa.ops.arrays import cache_format
from fd_dsa.ops.cache_probes import TENSOR_CORE_TOLERANCE, mla_case
from fd_dsa.ops.fixed_order import row_dependence_refusal
from fd_dsa.ops.library_kernel import LibraryKernel, difference, shared_kernel, why_not_compiled
from fd_dsa.ops.mla import tensor_core
from fd_dsa.ops.mla.records import Dequantized
from fd_dsa.ops.probes import Case
from fd_dsa.ops.providers import CUSTOM_OP, TENSOR_CORE, Choice, choose
from fd_dsa.tensor import Tensor

MOST_HEADS = 32
"""Of the kernel for few heads over FP8 records."""
FEW_HEADS = 16
"""Of those that are too few to be padded to 64 over bfloat16 latents."""


class SparseMla(ctypes.Structure):
    """FdDsaSparseMla of custom_ops/csrc/sparse_mla.h, which says what each field is."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "cache", "slots", "out", "lse")),
        ("softmax_scale", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ("num_tokens", "num_heads", "topk", "num_slots")),
        *((n, ctypes.c_int32) for n in ("out_is_bfloat16", "splits", "is_fp8")),
        *((n, ctypes.c_void_p) for n in ("dequantized", "dequantized_blocks", "is_dequantized")),
        ("batch_id_per_token", ctypes.c_void_p),
        *((n, ctypes.c_int32) for n in ("num_rows", "block_size", "dequantized_slots")),
    )


class CustomAttention(LibraryKernel):
    """A kernel of sparse MLA.

    Attributes:
        records_alone: it reads neither bfloat16 latents nor records that were dequantized before.
        probed_heads: of the small cases on which it has to agree before it serves.
        is_faster: of tokens and heads, whether it was at least as fast on an H200; with more tokens
            it stays so.
    """

    size, structure = "fd_dsa_sparse_mla_bytes", SparseMla
    records_alone: ClassVar[bool]
    probed_heads: ClassVar[tuple[int, ...]]

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """Return whether the kernel was at least as fast as Triton's on an H200."""
        raise NotImplementedError

    @classmethod
    def cases(cls) -> Iterable[Case]:
        """Attention of few and of padded heads, over every cache that the kernel takes."""
        limits = dict(TENSOR_CORE_TOLERANCE)
        if cls.records_alone:
            del limits["bfloat16"]
        return (mla_case(limits, heads) for heads in cls.probed_heads)

    def __call__(
        self,
        q: Tensor,
        cache: Tensor,
        slots: Tensor,
        out: Tensor,
        *,
        softmax_scale: float,
        kv_lora_rank: int = LATENT_WIDTH,
        lse: Tensor | None = None,
        splits: int = 0,
        dequantized: Dequantized | None = None,
    ) -> None:
        """See `attend_on_tensor_cores`, for the heads and caches of this kernel.

        Args:
            splits: blocks that share a token, see csrc/sparse_mla.h; 0: as suits the device.
            dequantized: records of the cache that were dequantized, for a kernel that takes them;
                what it names gives the same bits faster. A token of a row that was dequantized
                must name slots of that row's blocks alone; others are skipped, or are wrong.

        Cost: one launch, of blocks of 64 heads at most two; no allocation, no wait.
        """
        num_tokens, num_heads, _ = q.shape
        if num_tokens == 0 or num_heads == 0:
            return
        job = self.job
        self.bind(q)
        # read 16 bytes at a time
        for name, tensor in (("q", q), ("cache", cache), ("out", out)):
            setattr(job, name, self._address(name, tensor, multiple=16))
        job.slots = self._address("slots", slots)
        job.lse = None if lse is None else self._address("lse", lse)
        job.softmax_scale, job.splits = softmax_scale, splits
        job.is_fp8 = cache_format(cache).is_fp8
        job.num_tokens, job.num_heads, job.topk = num_tokens, num_heads, slots.shape[1]
        job.num_slots = min(prod(cache.shape[:-1]), 2**31 - 1)
        job.out_is_bfloat16 = str(out.dtype).endswith("bfloat16")
        job.dequantized = None
        if dequantized is not None:
            self._name_dequantized(dequantized)
        self.launch()

    def _name_dequantized(self, records: Dequantized) -> None:
        """Put addresses and sizes of dequantized records into the structure."""
        job = self.job
        job.dequantized = self._address("values", records.values, multiple=16)
        job.dequantized_blocks = self._address("blocks", records.blocks)
        job.is_dequantized = self._address("is_dequantized", records.is_dequantized)
        job.batch_id_per_token = self._address("batch_id_per_token", records.batch_id_per_token)
        job.num_rows = records.is_dequantized.shape[0]
        job.block_size, job.dequantized_slots = records.block_size, records.num_slots


class NarrowAttention(CustomAttention):
    """The kernel for 1 to 32 heads over FP8 records."""

    launcher = "fd_dsa_sparse_mla_narrow_cuda"
    records_alone = True
    probed_heads = (7, 20)

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """With more heads Triton's splits fill the device better for a few tokens."""
        return num_heads <= 16 or (num_heads <= MOST_HEADS and num_tokens >= 8)


class WideAttention(CustomAttention):
    """The kernel for blocks of 64 heads; a multiple of 64 goes without padding."""

    launcher = "fd_dsa_sparse_mla_wide_cuda"
    records_alone = False
    probed_heads = (64, 100)

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """For fewer blocks Triton's splits fill the device better than clusters do."""
        if num_heads <= MOST_HEADS:
            # bfloat16 latents: it was faster for prompts, though half of its GEMM rows were padding
            return num_heads > FEW_HEADS and num_tokens >= 1024
        return num_tokens * -(-num_heads // 64) > 4


def kind_for(num_heads: int, is_fp8: bool) -> type[CustomAttention] | None:
    """The kernel of custom_ops/ for so many heads over a cache; None: there is none."""
    if is_fp8 and num_heads <= MOST_HEADS:
        return NarrowAttention
    return WideAttention if num_heads > FEW_HEADS else None


def choose_attention(
    kind: str,
    num_heads: int,
    dtype: str,
    cache_dtype: str,
    rank: int,
    rope: int,
    capability: int,
    allocate: Allocate,
) -> Choice:
    """What `providers.choose` takes for these sizes and types, as of `tensor_core.why_not`.

    A kernel of custom_ops/ is compared with the definition first, for which the thread waits.
    """
    reason = tensor_core.why_not(capability, dtype, cache_dtype, rank, rope)
    conditions, own = {TENSOR_CORE: reason}, kind_for(num_heads, cache_dtype == "fp8_ds_mla")
    conditions[CUSTOM_OP] = reason or row_dependence_refusal() or why_not_compiled()
    if own is None:
        few = f"{num_heads} heads over bfloat16 latents, it takes more than {FEW_HEADS}"
        conditions[CUSTOM_OP] = conditions[CUSTOM_OP] or few
    return choose("sparse_mla", kind, conditions, lambda k: difference(own, k, allocate))


def attend_slots(q: Tensor, cache: Tensor, *others: Tensor, **options: Any) -> None:
    """See `CustomAttention.__call__`; one thread at a time."""
    kind = kind_for(q.shape[1], cache_format(cache).is_fp8)
    assert kind is not None, f"no kernel takes {q.shape[1]} heads"
    kernels = custom_ops.build().kernels
    # a class is hashable, which mypy does not see
    kernel = shared_kernel(kind, kernels)  # type: ignore[arg-type]
    kernel(q, cache, *others, **options)
