"""Sparse MLA by the CUDA C++ kernels of custom_ops/, through their C ABI.

The arguments and results are those of `attend_on_tensor_cores`. Few heads over FP8 records: codes
of latents are exact in float16, and scales stay float32 up to the weights, which are float16:
within 2^-11. Blocks of 64 heads: rounded where `attend_on_tensor_cores` says.
"""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import numpy as np

from fd_dsa.errors import BackendUnavailable, DtypeError, LaunchError, ShapeError
from fd_dsa.ops._fp8 import (
    LATENT_RECORD_BYTES,
    LATENT_TILES,
    LATENT_WIDTH,
    ROPE_WIDTH,
    decode_e4m3,
)
from fd_dsa.ops.cache_write.paddle_impl import bfloat16_bits
from fd_dsa.ops.sparse_mla.tensor_core import check_tensors
from fd_dsa.step.device import Allocate
from fd_dsa.triton_runtime.c_launch import CLaunch
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.transfers import on_host, transfers_for

MOST_HEADS = 32
MAX_SPLITS = 16
WIDE_SPLITS = (0, 1, 2, 4, 8, 16)
_PROBE_SLOTS, _PROBE_SCALE = 300, 0.05


class SparseMla(ctypes.Structure):
    """FdDsaSparseMla of custom_ops/csrc/sparse_mla_narrow.h, which says what each field is."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "cache", "slots", "out", "lse")),
        ("softmax_scale", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ("num_tokens", "num_heads", "topk", "num_slots")),
        *((n, ctypes.c_int32) for n in ("out_is_bfloat16", "splits")),
    )


class SparseMlaWide(ctypes.Structure):
    """FdDsaSparseMlaWide of custom_ops/csrc/sparse_mla_wide.h, which says what each field is."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "cache", "slots", "out", "lse")),
        ("softmax_scale", ctypes.c_float),
        *((n, ctypes.c_int32) for n in ("num_tokens", "num_heads", "topk", "num_slots")),
        *((n, ctypes.c_int32) for n in ("is_fp8", "out_is_bfloat16", "splits")),
    )


class _Attention:
    """A kernel of a loaded library; one of these serves one thread at a time.

    Args:
        kernels: the library.
        function: its launcher.
        structure: the first argument of that.
        size: the function that tells how large the library takes the structure to be.

    Raises:
        BackendUnavailable: the library is of another release.
    """

    def __init__(self, kernels: Any, function: str, structure: Any, size: str) -> None:
        if getattr(kernels, size)() != ctypes.sizeof(structure):
            raise BackendUnavailable(
                "fd_dsa_ops: its sparse MLA takes another structure than this fd_dsa passes; build "
                "it again: make custom-ops"
            )
        self._kernels, self._function, self._job = kernels, function, structure
        self._name = type(self).__name__
        self._launch: CLaunch | None = None
        self._api: Any = None
        self._device = -1

    def _attend(
        self, q: Any, cache: Any, slots: Any, out: Any, softmax_scale: float, lse: Any, splits: int
    ) -> None:
        """Launch over tensors that `check_tensors` let pass."""
        num_tokens, num_heads, _ = q.shape
        if num_tokens == 0 or num_heads == 0:
            return
        job = self._job
        self._take_device(q)
        job.q, job.cache = self._address("q", q), self._address("cache", cache)
        job.slots, job.out = self._address("slots", slots), self._address("out", out)
        job.lse = None if lse is None else self._address("lse", lse)
        job.softmax_scale, job.splits = softmax_scale, splits
        job.num_tokens, job.num_heads, job.topk = num_tokens, num_heads, slots.shape[1]
        job.num_slots = min(prod(cache.shape[:-1]), 2**31 - 1)
        job.out_is_bfloat16 = str(out.dtype).endswith("bfloat16")
        assert self._launch is not None
        self._launch()

    def _take_device(self, q: Any) -> None:
        """Launch where the queries lie."""
        api = api_for_type(type(q))
        device = api.device_of(q)
        if (api, device) != (self._api, self._device):
            self._launch = CLaunch(self._kernels, self._function, self._job, api, device)
            self._api, self._device = api, device

    def _address(self, name: str, tensor: Any) -> int:
        """Where a tensor lies on the device of the queries, which is read 16 bytes at a time."""
        device = self._api.device_of(tensor)
        if device != self._device:
            raise LaunchError(
                f"{self._name}: {name} is on device {device}, q is on device {self._device}"
            )
        if not tensor.is_contiguous():
            raise LaunchError(
                f"{self._name}: {name} of shape {list(tensor.shape)} is not contiguous; call "
                ".contiguous() first"
            )
        address = tensor.data_ptr()
        if name in ("q", "cache", "out") and address % 16:
            raise LaunchError(
                f"{self._name}: {name} begins off a multiple of 16 bytes; copy it first"
            )
        return int(address)


class NarrowAttention(_Attention):
    """The kernel for few heads over FP8 records; one of these serves one thread at a time.

    Args:
        kernels: the library.

    Raises:
        BackendUnavailable: it is of another release.
    """

    def __init__(self, kernels: Any) -> None:
        name = "fd_dsa_sparse_mla_narrow"
        super().__init__(kernels, f"{name}_cuda", SparseMla(), f"{name}_bytes")

    def __call__(
        self,
        q: Any,
        cache: Any,
        slots: Any,
        out: Any,
        *,
        softmax_scale: float,
        lse: Any = None,
        splits: int = 0,
    ) -> None:
        """See `attend_on_tensor_cores`; at most 32 heads, a cache of fp8_ds_mla records.

        Args:
            splits: blocks that share a token, up to 16; 0: as suits the device.

        Raises:
            ShapeError, DtypeError: an argument is not as it says there; nothing is launched.
            LaunchError: a tensor is not contiguous, or not on the device of the others.
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.

        Cost: one launch; no allocation, no wait.
        """
        if not check_tensors(self._name, q, cache, slots, out, lse):
            raise DtypeError(f"{self._name}: cache: got dtype {cache.dtype}, allowed is uint8")
        if q.shape[1] > MOST_HEADS:
            raise ShapeError(
                f"{self._name}: q has {q.shape[1]} heads, allowed are 1 to {MOST_HEADS}"
            )
        if not 0 <= splits <= MAX_SPLITS:
            raise ShapeError(f"{self._name}: splits: got {splits}, allowed are 0 to {MAX_SPLITS}")
        self._attend(q, cache, slots, out, softmax_scale, lse, splits)


class WideAttention(_Attention):
    """The kernel for blocks of 64 heads; one of these serves one thread at a time.

    Args:
        kernels: the library.

    Raises:
        BackendUnavailable: it is of another release.
    """

    def __init__(self, kernels: Any) -> None:
        name = "fd_dsa_sparse_mla_wide"
        super().__init__(kernels, f"{name}_cuda", SparseMlaWide(), f"{name}_bytes")

    def __call__(
        self,
        q: Any,
        cache: Any,
        slots: Any,
        out: Any,
        *,
        softmax_scale: float,
        lse: Any = None,
        splits: int = 0,
    ) -> None:
        """See `attend_on_tensor_cores`; any number of heads, a multiple of 64 without padding.

        Args:
            splits: blocks that share a token and 64 heads: 1, 2, 4, 8 or 16; 0: as suits the
                device.

        Raises:
            ShapeError, DtypeError: an argument is not as it says there; nothing is launched.
            LaunchError: a tensor is not contiguous, or not on the device of the others.
            DeviceError: the CUDA runtime refuses the launch, or earlier work has failed.

        Cost: one launch; no allocation, no wait.
        """
        self._job.is_fp8 = check_tensors(self._name, q, cache, slots, out, lse)
        if splits not in WIDE_SPLITS:
            allowed = ", ".join(map(str, WIDE_SPLITS))
            raise ShapeError(f"{self._name}: splits: got {splits}, allowed are {allowed}")
        self._attend(q, cache, slots, out, softmax_scale, lse, splits)

    @staticmethod
    def is_faster(num_tokens: int, num_heads: int) -> bool:
        """Whether it was faster than the Triton kernel on an H200, over FP8 records.

        Between, Triton's splits fill the device better than clusters do.
        """
        blocks = num_tokens * -(-num_heads // 64)
        return num_heads > MOST_HEADS and (8 <= blocks <= 16 or blocks > 32)


def difference(kernels: Any, allocate: Allocate) -> str:
    """How far small cases for few heads are from the host's; "" where they are near.

    Waits for the device.

    Args:
        kernels: a library that offers to serve.
        allocate: makes a tensor of a shape and dtype on the device.
    """
    cache = _records(np.random.default_rng(1), _PROBE_SLOTS)
    return _difference(NarrowAttention(kernels), cache, (7, 20), allocate)


def wide_difference(kernels: Any, allocate: Allocate) -> str:
    """As `difference`, for many heads, and for both caches."""
    attend, rng = WideAttention(kernels), np.random.default_rng(1)
    roped = rng.standard_normal((_PROBE_SLOTS, LATENT_WIDTH + ROPE_WIDTH)).astype(np.float32)
    caches = _records(rng, _PROBE_SLOTS), bfloat16_bits(roped)
    wrong = (_difference(attend, cache, (64, 100), allocate) for cache in caches)
    return next(filter(None, wrong), "")


def _records(rng: np.random.Generator, num_slots: int) -> np.ndarray:
    """uint8 [num_slots, 656] fp8_ds_mla records."""
    cache = rng.integers(0, 120, (num_slots, LATENT_RECORD_BYTES)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.01, (num_slots, 4)).astype(np.float32)
    roped = bfloat16_bits(rng.standard_normal((num_slots, ROPE_WIDTH)).astype(np.float32))
    cache[:, LATENT_WIDTH : LATENT_WIDTH + 16] = scales.view(np.uint8)
    cache[:, LATENT_WIDTH + 16 :] = roped.view(np.uint8)
    return cache


def _difference(
    attend: Any, cache: np.ndarray, heads_of_cases: tuple[int, ...], allocate: Allocate
) -> str:
    """How far the cases of a probe are from the definition; "" where they are near."""
    rng, topk, is_fp8 = np.random.default_rng(0), 150, cache.dtype == np.uint8
    on_device = _on_device(allocate, cache, "uint8" if is_fp8 else "bfloat16")
    keys = _keys_of(cache) if is_fp8 else _widened(cache)
    for heads in heads_of_cases:
        shape = 3, heads, LATENT_WIDTH + ROPE_WIDTH
        bits = bfloat16_bits(rng.standard_normal(shape).astype(np.float32)).view(np.uint16)
        slots = rng.integers(0, len(cache), (3, topk)).astype(np.int32)
        slots[1, 9:], slots[2] = -1, -1
        wanted = _attended(_widened(bits), keys, slots)
        q, chosen = _on_device(allocate, bits, "bfloat16"), _on_device(allocate, slots, "int32")
        out = allocate(wanted.shape, "float32")
        attend(q, on_device, chosen, out, softmax_scale=_PROBE_SCALE)
        error = np.linalg.norm(on_host(out, wanted) - wanted) / np.linalg.norm(wanted)
        if not error < (2e-3 if is_fp8 else 8e-3):
            return f"{heads} heads of the probe are off by {error:.1e} of the definition"
    return ""


def _attended(q: np.ndarray, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """float32 [tokens, heads, 512]: the definition, in NumPy; zeros where a row names no slot."""
    wanted = np.zeros((*q.shape[:2], LATENT_WIDTH), np.float32)
    for token, row in enumerate(slots):
        chosen = keys[row[row >= 0]].astype(np.float64)
        if len(chosen):
            scores = _PROBE_SCALE * q[token] @ chosen.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            wanted[token] = weights @ chosen[:, :LATENT_WIDTH]
    return wanted


def _keys_of(records: np.ndarray) -> np.ndarray:
    """float32 [num_slots, 576] of fp8_ds_mla records."""
    end = LATENT_WIDTH + 4 * LATENT_TILES
    scales = np.ascontiguousarray(records[:, LATENT_WIDTH:end]).view(np.float32)
    latents = decode_e4m3(records[:, :LATENT_WIDTH]) * np.repeat(
        scales, LATENT_WIDTH // LATENT_TILES, axis=1
    )
    roped = np.ascontiguousarray(records[:, end:]).view(np.uint16)
    return np.concatenate([latents, _widened(roped)], axis=1)


def _widened(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bits."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _on_device(allocate: Allocate, array: np.ndarray, dtype: str) -> Any:
    """A tensor with the values of an array, which are there when this returns."""
    tensor = allocate(array.shape, dtype)
    transfers = transfers_for(tensor)
    transfers.to_device(tensor, np.ascontiguousarray(array))
    done = transfers.event()
    done.record()
    done.wait()
    return tensor
