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

vLLM itself is not imported: loading the library registers its operators with torch. DeepGEMM
compiles its kernels with nvcc when they are first used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks._harness import ROOT
from fd_dsa.ops._fp8 import INDEX_RECORD_BYTES, INDEX_WIDTH, LATENT_RECORD_BYTES


def vllm_cache_ops(folder: Path | None) -> Any | None:
    """vLLM's `torch.ops._C_cache_ops`, or None, with one printed line, without its library."""
    return torch.ops._C_cache_ops if _vllm_is_loaded(folder) else None


def vllm_ops(folder: Path | None) -> Any | None:
    """vLLM's `torch.ops._C`, or None, with one printed line, without its library."""
    return torch.ops._C if _vllm_is_loaded(folder) else None


def vllm_writes(
    ops: Any,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    key: torch.Tensor,
    latents: torch.Tensor,
    index: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """vLLM's writes of finished keys into both caches; `scale` is any number, and is not read."""
    records = latents.view(-1, 64, LATENT_RECORD_BYTES)
    ops.concat_and_cache_mla(latent, k_pe, records, slots, "fp8_ds_mla", scale)
    keys = index.view(-1, 64, INDEX_RECORD_BYTES)
    ops.indexer_k_quant_and_cache(key, keys, slots, INDEX_WIDTH, "ue8m0")


@cache
def _vllm_is_loaded(folder: Path | None) -> bool:
    """Load vLLM's library of operators, unless it is not there."""
    path = _found(folder, "_C_stable_libtorch.abi3.so")
    if path is None:
        return False
    return _is_loaded(path)


def _is_loaded(path: Path) -> bool:
    """Load a library of operators; if that fails, print why and return False."""
    _load_cuda_libraries()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        print(f"peer left out: {path.name}: {error}", flush=True)
        return False
    return True


@cache
def flashinfer_topk(folder: Path | None) -> Any | None:
    """FlashInfer's top-k as a C library, or None, with one printed line, without it."""
    path = _found(folder, "fi_topk.so")
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.fi_topk.argtypes = (*[pointer] * 5, *[number] * 6, pointer)
    if hasattr(library, "fi_topk_clusters"):
        library.fi_topk_clusters.argtypes = (*[pointer] * 5, *[number] * 5, pointer)
    else:
        print("peer left out: fi_topk_clusters: not in fi_topk.so", flush=True)
    return library


@cache
def vllm_indexer_query(folder: Path | None) -> Any | None:
    """The Triton kernel of vLLM that prepares the indexer's query; None where it is absent."""
    path = _found(folder, "triton_peers/indexer_q.py")
    if path is None:
        return None
    return _module(path)._fused_indexer_q_rope_quant_kernel


def prepare_indexer_query(
    kernel: Any,
    positions: torch.Tensor,
    q: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    folded: torch.Tensor,
) -> None:
    """Launch vLLM's kernel as vLLM does; the result is in `codes` and `folded`."""
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


@cache
def flash_mla_builds(folder: Path | None) -> list[tuple[str, Any, bool]]:
    """Builds of FlashMLA: label, operators, and whether they take a result to write to."""
    libraries = (
        ("FlashMLA of vLLM", "_flashmla_C.abi3.so", "_flashmla_C", True),
        ("FlashMLA of SGLang", "sgl_flashmla_ops.abi3.so", "sgl_kernel", False),
    )
    found = []
    for label, name, namespace, takes_out in libraries:
        path = _found(folder, name)
        if path is not None and _is_loaded(path):
            found.append((label, getattr(torch.ops, namespace), takes_out))
    return found


def flash_mla_decode(
    ops: Any,
    takes_out: bool,
    q: torch.Tensor,
    latents: torch.Tensor,
    slots: torch.Tensor,
    schedule: Any,
    scale: float,
) -> tuple[torch.Tensor, Any]:
    """FlashMLA over FP8 records, each token a batch of its own.

    Args:
        q: bfloat16 [num_tokens, 64 or 128, 576].
        latents: uint8, records of 656 bytes in pages of 64.
        slots: int32 [num_tokens, topk].
        schedule: what an earlier call returned, or (None, None).

    Returns:
        bfloat16 [num_tokens, heads, 512], and the schedule.
    """
    out, _, *made = ops.sparse_decode_fwd(
        *(q.unsqueeze(1), latents.view(-1, 64, 1, 656), slots.unsqueeze(1), None, None, *schedule),
        *(None, None, None, 512, scale, *((None,) if takes_out else ())),
    )
    return out.squeeze(1), made


@cache
def vllm_sparse_mla(folder: Path | None) -> Any | None:
    """vLLM's sparse MLA in Triton, for bfloat16 latents; None where it is absent."""
    path = _found(folder, "triton_peers/mla_sparse.py")
    return None if path is None else _module(path).triton_bf16_mla_sparse_interface


class DeepGemm:
    """DeepGEMM's kernels that score the keys of an fp8_ds_mla cache.

    Args:
        module: the package.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._paged, self._paged_takes_pair = _fp8_form(module, "paged_mqa_logits")
        self._gathered, self._gathered_takes_pair = _fp8_form(module, "mqa_logits")

    def schedule(self, lengths: torch.Tensor) -> torch.Tensor:
        """How int32 [rows, tokens of a row] keys are shared out to processors."""
        parts = int(self._module.get_num_sms())
        # two of its blocks share the keys of rows of four tokens
        parts = parts // 2 if lengths.shape[1] == 4 else parts
        return self._module.get_paged_mqa_logits_metadata(lengths, 64, parts)

    def score_pages(
        self,
        q: torch.Tensor,
        cache: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        schedule: torch.Tensor,
        width: int,
    ) -> torch.Tensor:
        """float32 [num_tokens, width]: scores of the keys in the pages of each row.

        Args:
            q: float8_e4m3fn [num_tokens, index_n_heads, 128].
            cache: uint8 [num_blocks, 64, 132].
            weights: float32 [num_tokens, index_n_heads].
            lengths: int32 [rows, tokens of a row]; keys that each token sees.
            tables: int32 [rows, max_blocks].
            schedule: of these lengths.
            width: keys of the longest row.
        """
        q = q.view(*lengths.shape, *q.shape[1:])
        pages = cache.view(-1, 64, 1, cache.shape[-1])
        query = (q, None) if self._paged_takes_pair else q
        rest = weights, lengths, tables, schedule, width
        return self._paged(query, pages, *rest, clean_logits=False)

    def score_gathered(
        self,
        q: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        weights: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """float32 [num_tokens, num_keys]: scores of contiguous keys.

        Args:
            q, weights: as in `score_pages`.
            keys: float8_e4m3fn [num_keys, 128] and their float32 [num_keys] scales.
            starts, ends: int32 [num_tokens]; the keys that each token sees.
        """
        query = (q, None) if self._gathered_takes_pair else q
        return self._gathered(query, keys, weights, starts, ends, clean_logits=False)


def _fp8_form(module: Any, name: str) -> tuple[Any, bool]:
    """The function of FP8 alone, or the one whose query is a pair of values and FP4 scales."""
    plain = getattr(module, f"fp8_{name}", None)
    return (getattr(module, f"fp8_fp4_{name}"), True) if plain is None else (plain, False)


@cache
def deep_gemm(folder: Path | None) -> DeepGemm | None:
    """DeepGEMM's kernels; None where the package is absent."""
    if _found(folder, "deep_gemm/__init__.py") is None:
        return None
    os.environ.setdefault("DG_JIT_CACHE_DIR", str(ROOT / "build" / "deep_gemm_cache"))
    sys.path.insert(0, str(folder))
    return DeepGemm(importlib.import_module("deep_gemm"))


def _module(path: Path) -> Any:
    """A Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_cuda_libraries() -> None:
    """Load what a peer may link and torch itself loads late: NVRTC and cuBLAS of its wheels."""
    for pattern in ("**/libnvrtc.so.*", "**/libcublasLt.so.*", "**/libcublas.so.*"):
        for folder in sys.path:
            for library in sorted((Path(folder) / "nvidia").glob(pattern)):
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _found(folder: Path | None, name: str) -> Path | None:
    """The file of a peer, or None after saying that it is left out."""
    path = folder / name if folder else None
    if path is None or not path.exists():
        print(f"peer left out: {name}: not in --peers {folder or '(not given)'}", flush=True)
        return None
    return path
