"""Kernels of other projects, for a comparison in the same process.

A folder for `--peers` holds, taken out of the wheel vllm 0.26.0 (built for torch 2.11):

    _C_stable_libtorch.abi3.so     vllm/_C_stable_libtorch.abi3.so
    _flashmla_C.abi3.so            vllm/_flashmla_C.abi3.so
    sgl_flashmla_ops.abi3.so       sgl_kernel/flashmla_ops.abi3.so of the wheel sglang-kernel 0.4.4
    deep_gemm/                     vllm/third_party/deep_gemm/, with the _C of this Python alone
    triton_peers/mla_sparse.py     the function `triton_bf16_mla_sparse_interface` of vLLM and the
                                   kernel that it launches, with their imports
    triton_peers/indexer_q.py      the function `_fused_indexer_q_rope_quant_kernel` of
                                   vllm/model_executor/layers/sparse_attn_indexer.py, with its
                                   imports of triton
    fi_topk.so                     FlashInfer's top-k as C functions of plain arguments, made
                                   of the headers of the wheel flashinfer-python 0.6.14 by

    nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC \\
        --expt-relaxed-constexpr -I flashinfer/data/include -I EMPTY -o fi_topk.so fi_topk.cu

The source is benchmarks/fi_topk.cu. EMPTY holds tvm/ffi/error.h, which may be an empty file.

A peer that is absent is None, and a line says so. vLLM itself is not imported: loading the library
registers its operators with torch. DeepGEMM compiles its kernels with nvcc when they are first
used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import ROOT
from fd_dsa.cache_formats import INDEX_RECORD_BYTES, INDEX_WIDTH, LATENT_RECORD_BYTES

_VLLM = "_C_stable_libtorch.abi3.so"


@cache
def torch_ops(folder: Path | None, name: str, namespace: str) -> Any | None:
    """Load a library and return `torch.ops.<namespace>`, or None with a printed reason."""
    path = _found(folder, name)
    if path is None:
        return None
    # libraries that a peer may link and torch loads late: NVRTC and cuBLAS of its wheels
    for pattern in ("**/libnvrtc.so.*", "**/libcublasLt.so.*", "**/libcublas.so.*"):
        for root in sys.path:
            for library in sorted((Path(root) / "nvidia").glob(pattern)):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        print(f"peer left out: {name}: {error}", flush=True)
        return None
    return getattr(torch.ops, namespace)


def vllm_cache_ops(folder: Path | None) -> Any | None:
    """Return vLLM's operators on caches."""
    return torch_ops(folder, _VLLM, "_C_cache_ops")


def vllm_ops(folder: Path | None) -> Any | None:
    """Return vLLM's other operators."""
    return torch_ops(folder, _VLLM, "_C")


def vllm_writes(ops: Any, *inputs: torch.Tensor) -> None:
    """Write finished keys into both caches by vLLM's operators.

    Args:
        ops: result of `vllm_cache_ops`.
        inputs: latent, k_pe and index key; both caches; slots; and a scale, any number, which is
            not read.
    """
    latent, k_pe, key, latents, index, slots, scale = inputs
    records = latents.view(-1, 64, LATENT_RECORD_BYTES)
    ops.concat_and_cache_mla(latent, k_pe, records, slots, "fp8_ds_mla", scale)
    keys = index.view(-1, 64, INDEX_RECORD_BYTES)
    ops.indexer_k_quant_and_cache(key, keys, slots, INDEX_WIDTH, "ue8m0")


@cache
def flashinfer_topk(folder: Path | None) -> Any | None:
    """Return FlashInfer's top-k as a C library."""
    path = _found(folder, "fi_topk.so")
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.fi_topk.argtypes = (*[pointer] * 5, *[number] * 6, pointer)
    library.fi_topk_clusters.argtypes = (*[pointer] * 5, *[number] * 5, pointer)
    return library


def vllm_indexer_query(folder: Path | None) -> Any | None:
    """Return the Triton kernel of vLLM that prepares the indexer's query."""
    return _of_file(folder, "triton_peers/indexer_q.py", "_fused_indexer_q_rope_quant_kernel")


def vllm_sparse_mla(folder: Path | None) -> Any | None:
    """Return vLLM's sparse MLA in Triton, for bfloat16 latents."""
    return _of_file(folder, "triton_peers/mla_sparse.py", "triton_bf16_mla_sparse_interface")


def prepare_indexer_query(
    kernel: Any,
    positions: torch.Tensor,
    q: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    folded: torch.Tensor,
) -> None:
    """Launch vLLM's kernel like vLLM. The result is in `codes` and `folded`."""
    num_tokens, heads, dim = q.shape
    kernel[num_tokens, heads](
        *(positions, q, q.stride(0), q.stride(1), cos_sin, cos_sin.stride(0)),
        *(codes, codes.stride(0), codes.stride(1), weights, weights.stride(0), weights.stride(1)),
        *(folded, folded.stride(0), folded.stride(1), dim**-0.5, heads**-0.5),
        fp8_min=-448.0,
        fp8_max=448.0,
        is_neox=True,
        num_warps=1,
    )


def flash_mla_builds(folder: Path | None) -> list[tuple[str, Any, bool]]:
    """Return builds of FlashMLA: label, operators, and True if they take an output."""
    vllm = torch_ops(folder, "_flashmla_C.abi3.so", "_flashmla_C")
    sglang = torch_ops(folder, "sgl_flashmla_ops.abi3.so", "sgl_kernel")
    builds = ("FlashMLA of vLLM", vllm, True), ("FlashMLA of SGLang", sglang, False)
    return [build for build in builds if build[1] is not None]


def flash_mla_decode(
    ops: Any,
    takes_out: bool,
    q: torch.Tensor,
    latents: torch.Tensor,
    slots: torch.Tensor,
    schedule: Any,
    scale: float,
) -> tuple[torch.Tensor, Any]:
    """Run FlashMLA over FP8 records, with a batch for each token.

    Args:
        q: bfloat16 [num_tokens, 64 or 128, 576].
        latents: uint8, records of 656 bytes in pages of 64.
        slots: int32 [num_tokens, topk].
        schedule: schedule of an earlier call, or (None, None).

    Returns:
        bfloat16 [num_tokens, heads, 512], and the schedule.
    """
    out, _, *made = ops.sparse_decode_fwd(
        *(q.unsqueeze(1), latents.view(-1, 64, 1, 656), slots.unsqueeze(1), None, None, *schedule),
        *(None, None, None, 512, scale, *((None,) if takes_out else ())),
    )
    return out.squeeze(1), made


class DeepGemm:
    """DeepGEMM's kernels that score the keys of an fp8_ds_mla cache.

    Args:
        module: the package.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def schedule(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the schedule that divides int32 [rows, tokens of a row] keys among processors."""
        parts = int(self._module.get_num_sms())
        # two of its blocks share the keys of rows of four tokens
        parts = parts // 2 if lengths.shape[1] == 4 else parts
        return self._module.get_paged_mqa_logits_metadata(lengths, 64, parts)

    def score_pages(
        self, q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor,
        tables: torch.Tensor, schedule: torch.Tensor, width: int,
    ) -> torch.Tensor:  # fmt: skip
        """Return float32 [num_tokens, width]: scores of the keys in the pages of each row.

        Args:
            q: float8_e4m3fn [num_tokens, index_n_heads, 128].
            cache: uint8 [num_blocks, 64, 132].
            weights: float32 [num_tokens, index_n_heads].
            lengths: int32 [rows, tokens of a row]; keys that each token sees.
            tables: int32 [rows, max_blocks].
            schedule: schedule of these lengths.
            width: keys of the longest row.
        """
        pages = cache.view(-1, 64, 1, cache.shape[-1])
        rest = pages, weights, lengths, tables, schedule, width
        return self._score("paged_mqa_logits", q.view(*lengths.shape, *q.shape[1:]), *rest)

    def score_gathered(self, q: torch.Tensor, keys: Any, *rest: torch.Tensor) -> torch.Tensor:
        """Return float32 [num_tokens, num_keys]: scores of contiguous keys.

        Args:
            q: as in `score_pages`.
            keys: float8_e4m3fn [num_keys, 128] and their float32 [num_keys] scales.
            rest: weights as in `score_pages`; begins and ends, int32 [num_tokens], of the keys
                that each token sees.
        """
        return self._score("mqa_logits", q, keys, *rest)

    def _score(self, name: str, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Score by the function for FP8, or by the one whose query is a pair with FP4 scales."""
        plain = getattr(self._module, f"fp8_{name}", None)
        if plain is not None:
            return plain(q, *rest, clean_logits=False)
        return getattr(self._module, f"fp8_fp4_{name}")((q, None), *rest, clean_logits=False)


@cache
def deep_gemm(folder: Path | None) -> DeepGemm | None:
    """Return DeepGEMM's kernels."""
    if _found(folder, "deep_gemm/__init__.py") is None:
        return None
    os.environ.setdefault("DG_JIT_CACHE_DIR", str(ROOT / "build" / "deep_gemm_cache"))
    sys.path.insert(0, str(folder))
    return DeepGemm(importlib.import_module("deep_gemm"))


@cache
def _of_file(folder: Path | None, name: str, function: str) -> Any | None:
    """Return a function of a Python file, imported as a module."""
    path = _found(folder, name)
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def _found(folder: Path | None, name: str) -> Path | None:
    """Return the file of a peer, or None with a printed reason."""
    path = folder / name if folder else None
    if path is None or not path.exists():
        print(f"peer left out: {name}: not in --peers {folder or '(not given)'}", flush=True)
        return None
    return path
