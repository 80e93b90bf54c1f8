"""Attention of DeepSeek-V4 by the CUDA C++ kernel of custom_ops/, in steps of many tokens.

A block of the kernel has all keys of a token and 64 of its heads, of which some may be padding. Its
time hardly depends on the number of tokens until there is one for each multiprocessor.
"""

from __future__ import annotations

import ctypes

from fd_dsa.cache_formats import v4_record_bytes
from fd_dsa.errors import ShapeError
from fd_dsa.ops.arrays import dtype_name
from fd_dsa.ops.dense_kernels import kernel_arguments
from fd_dsa.ops.library_kernel import LibraryKernel, hopper_kernel
from fd_dsa.ops.v4_places import Entries, PlainKeys, TokenPlaces, Windows
from fd_dsa.tensor import Fp8Rows, Tensor

FEW_PROGRAMS = 32
"""Maximum number of Triton's programs, without splits, for which its kernel is as fast.

It was measured on an H200 with 64 heads. Triton's kernel splits the keys of so few programs, and
its time depends on their number.
"""
# sizes that csrc/v4_attend.cu is made for
_WIDTH, _ROPE = 512, 64
_INPUTS = "q", "keys", "ring", "pool", "slots", "sinks", "cos_sin"
_PLACES = "positions", "rows", "starts", "block_table"
_PLAIN = "plain_keys", "plain_ring", "plain_pool"
_SIZES = "num_tokens", "num_heads", "window", "ring_rows", "ratio", "per_block", "table_width"
_NUMBERS = *_SIZES, "topk", "num_slots", "num_plain_slots", "is_fp8", "starts_early"


class V4Attend(ctypes.Structure):
    """FdDsaV4Attend of custom_ops/csrc/v4_attend.h, which describes the fields."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in (*_INPUTS, *_PLACES, *_PLAIN)),
        *((n, ctypes.c_void_p) for n in ("is_plain", "out", "codes", "scales")),
        *((n, ctypes.c_int64) for n in ("q_stride", "scale_stride")),
        ("epsilon", ctypes.c_float),
        *((n, ctypes.c_int32) for n in _NUMBERS),
    )


class V4AttendKernel(LibraryKernel):
    """Kernel of a loaded library for `attend_v4` over bfloat16 keys, or over their FP8 records."""

    launcher, size, structure = "fd_dsa_v4_attend_cuda", "fd_dsa_v4_attend_bytes", V4Attend

    def __call__(
        self,
        q: Tensor,
        windows: Windows,
        entries: Entries | None,
        sinks: Tensor,
        cos_sin: Tensor,
        places: TokenPlaces,
        epsilon: float,
        out: Tensor | Fp8Rows,
        plain: PlainKeys | None = None,
    ) -> None:
        """Enqueue one launch.

        Args:
            q, windows, entries, sinks, cos_sin, places, epsilon, plain: as for `attend_v4`.
            out: its result, bfloat16 or Fp8Rows with powers of two as scales.

        Raises:
            ShapeError: a row of queries, keys or entries has another size than the kernel reads.
        """
        job = self.job
        job.is_fp8 = dtype_name(windows.keys.dtype) == "uint8"
        self._check_rows(q, windows, entries, sinks.shape[0])
        self.bind(q)
        if plain is not None:
            places = places._replace(block_table=plain.block_table)
        pool, ratio, slots = entries or (None, 1, None)
        values, codes, scales, job.scale_stride = kernel_arguments(out)
        key_bytes = 8 if job.is_fp8 else 16
        self._set_addresses(key_bytes, keys=windows.keys, ring=windows.ring, pool=pool)
        self._set_addresses(16, cos_sin=cos_sin, out=values, codes=codes)
        self._set_addresses(slots=slots, sinks=sinks, scales=scales, **places._asdict())
        job.q = self._address("q", q, multiple=16, may_have_gaps=True)
        job.q_stride, job.epsilon = q.strides[0], epsilon
        job.num_tokens, job.num_heads = q.shape[0], sinks.shape[0]
        job.window, job.ring_rows, job.ratio = windows.size, windows.ring_rows, ratio
        job.table_width, job.topk = places.block_table.shape[1], 0
        job.per_block, job.num_slots = 1, 0
        if pool is not None:
            job.per_block, job.num_slots = pool.shape[1], pool.shape[0] * pool.shape[1]
        if slots is not None:
            job.topk = slots.shape[1]
        self._set_plain(plain)
        self.launch()

    def _check_rows(
        self, q: Tensor, windows: Windows, entries: Entries | None, num_heads: int
    ) -> None:
        """Check the sizes of rows, which the structure lacks."""
        key = v4_record_bytes(_WIDTH, _ROPE) if self.job.is_fp8 else _WIDTH
        rows = [("q", q, num_heads * _WIDTH)]
        rows += [("keys", windows.keys, key), ("ring", windows.ring, key)]
        rows += [] if entries is None else [("pool", entries.pool, key)]
        for name, tensor, size in rows:
            if tensor.shape[-1] != size:
                raise ShapeError(
                    f"{self.launcher}: got rows of {tensor.shape[-1]} in {name}; must be {size}"
                )

    def _set_plain(self, plain: PlainKeys | None) -> None:
        """Write addresses of plain keys to the structure, or that there are none."""
        keys, ring, pool, is_plain, _, num_slots = plain or (None, None, None, None, None, 0)
        self._set_addresses(16, plain_keys=keys, plain_ring=ring, plain_pool=pool)
        self._set_addresses(is_plain=is_plain)
        self.job.num_plain_slots = num_slots


def suits(kind: str, num_programs: int, width: int, rope: int, round_scales: bool | None) -> bool:
    """Return True if the kernel supports these sizes, and is faster than Triton's.

    Args:
        num_programs: programs that Triton's kernel would have without splits.
    """
    return (
        kind == "bfloat16"
        and num_programs > FEW_PROGRAMS
        and (width, rope) == (_WIDTH, _ROPE)
        and round_scales is not False
    )


def kernel_for(q: Tensor) -> V4AttendKernel | None:
    """Return the kernel for queries on their device, None to use Triton's. The choice is logged."""
    return hopper_kernel(V4AttendKernel, q, "attention of DeepSeek-V4 in steps of many tokens")
