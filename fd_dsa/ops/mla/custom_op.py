"""Sparse MLA by the CUDA C++ kernels of custom_ops/, through their C ABI.

Arguments and results are those of `attend_on_tensor_cores`. The kernel for few heads over FP8
records keeps codes exactly in float16 and scales in float32. Its weights are float16, within 2^-11.
The kernel for blocks of 64 heads rounds as `attend_on_tensor_cores` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from math import prod
from typing import Any, ClassVar

from fd_dsa import custom_ops
from fd_dsa.cache_formats import LATENT_WIDTH
from fd_dsa.ops.arrays import cache_format
from fd_dsa.ops.cache_probes import TENSOR_CORE_TOLERANCE, mla_case
from fd_dsa.ops.library_kernel import LibraryKernel, shared_kernel
from fd_dsa.ops.mla.records import Dequantized
from fd_dsa.ops.probes import Case
from fd_dsa.tensor import Tensor

MAX_NARROW_HEADS = 32
"""Maximum heads of the kernel for few heads over FP8 records."""
MIN_WIDE_HEADS = 17
"""Minimum heads that are worth padding to 64, over bfloat16 latents."""


class SparseMla(ctypes.Structure):
    """Structure FdDsaSparseMla of custom_ops/csrc/sparse_mla.h, which documents the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "cache", "slots", "out", "lse")),
        ("softmax_scale", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ("num_tokens", "num_heads", "topk", "num_slots")),
        *((n, ctypes.c_int32) for n in ("out_is_bfloat16", "splits", "is_fp8")),
        *((n, ctypes.c_void_p) for n in ("dequantized", "dequantized_blocks", "is_dequantized")),
        ("batch_id_per_token", ctypes.c_void_p),
        *((n, ctypes.c_int32) for n in ("num_rows", "block_size", "dequantized_slots")),
        ("starts_early", ctypes.c_int32),
    )


class CustomAttention(LibraryKernel):
    """Kernel for sparse MLA.

    Attributes:
        records_alone: True if the kernel reads only FP8 records: no bfloat16 latents, and no
            dequantized records.
        probed_heads: numbers of heads of the self-checks.
    """

    size, structure = "fd_dsa_sparse_mla_bytes", SparseMla
    records_alone: ClassVar[bool]
    probed_heads: ClassVar[tuple[int, ...]]

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """Return whether the kernel was at least as fast as Triton's on an H200.

        If it is faster for a number of tokens, it is for more tokens too.
        """
        raise NotImplementedError

    @classmethod
    def cases(cls) -> Iterable[Case]:
        """Return cases of few and of padded heads, over every supported cache."""
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
        """Attend as `attend_on_tensor_cores`, for the heads and caches of this kernel.

        Args:
            splits: blocks that share a token, see csrc/sparse_mla.h; 0 = chosen for the device.
            dequantized: records of the cache that are dequantized, if the kernel supports them.
                They give the same bits faster. Tokens of a dequantized row must name only slots of
                the row's blocks. Other slots are skipped or give wrong results.

        Cost: one launch, for blocks of 64 heads up to two, without an allocation or a wait.
        """
        num_tokens, num_heads, _ = q.shape
        if num_tokens == 0 or num_heads == 0:
            return
        job = self.job
        self.bind(q)
        # the kernel reads 16 bytes at a time
        self._set_addresses(16, q=q, cache=cache, out=out)
        self._set_addresses(slots=slots, lse=lse)
        job.softmax_scale, job.splits = softmax_scale, splits
        job.is_fp8 = cache_format(cache).is_fp8
        job.num_tokens, job.num_heads, job.topk = num_tokens, num_heads, slots.shape[1]
        job.num_slots = min(prod(cache.shape[:-1]), 2**31 - 1)
        job.out_is_bfloat16 = str(out.dtype).endswith("bfloat16")
        job.dequantized = None
        if dequantized is not None:
            self._set_dequantized(dequantized)
        self.launch()

    def _set_dequantized(self, records: Dequantized) -> None:
        """Write addresses and sizes of dequantized records to the structure."""
        job = self.job
        self._set_addresses(16, dequantized=records.values)
        self._set_addresses(
            dequantized_blocks=records.blocks,
            is_dequantized=records.is_dequantized,
            batch_id_per_token=records.batch_id_per_token,
        )
        job.num_rows = records.is_dequantized.shape[0]
        job.block_size, job.dequantized_slots = records.block_size, records.num_slots


class NarrowAttention(CustomAttention):
    """Kernel for 1 to 32 heads over FP8 records."""

    launcher = "fd_dsa_sparse_mla_narrow_cuda"
    records_alone = True
    probed_heads = (7, 20)

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """See CustomAttention."""
        # with more heads and few tokens Triton's splits fill the device better
        return num_heads <= 16 or (num_heads <= MAX_NARROW_HEADS and num_tokens >= 8)


class WideAttention(CustomAttention):
    """Kernel for blocks of 64 heads, which pads other numbers of heads."""

    launcher = "fd_dsa_sparse_mla_wide_cuda"
    records_alone = False
    probed_heads = (64, 100)

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """See CustomAttention."""
        if num_heads <= MAX_NARROW_HEADS:
            # bfloat16 latents: faster for prompts, although half of the GEMM rows are padding
            return num_heads >= MIN_WIDE_HEADS and num_tokens >= 1024
        # for fewer blocks Triton's splits fill the device better than clusters do
        return num_tokens * -(-num_heads // 64) > 4


def kind_for(num_heads: int, is_fp8: bool) -> type[CustomAttention] | None:
    """Return the kernel of custom_ops/ for a number of heads and a cache, None without one."""
    if is_fp8 and num_heads <= MAX_NARROW_HEADS:
        return NarrowAttention
    return WideAttention if num_heads >= MIN_WIDE_HEADS else None


def attend_slots(q: Tensor, cache: Tensor, *others: Tensor, **options: Any) -> None:
    """Attend by the kernel that all callers share, one thread at a time."""
    kind = kind_for(q.shape[1], cache_format(cache).is_fp8)
    assert kind is not None, f"no kernel takes {q.shape[1]} heads"
    kernels = custom_ops.build().kernels
    # mypy does not know that a class is hashable
    kernel = shared_kernel(kind, kernels)  # type: ignore[arg-type]
    kernel(q, cache, *others, **options)
