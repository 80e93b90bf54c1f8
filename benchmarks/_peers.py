"""Kernels of other projects, for a comparison in the same process.

A folder for `--peers` holds, taken out of the wheel vllm 0.26.0 (built for torch 2.11):

    _C_stable_libtorch.abi3.so     vllm/_C_stable_libtorch.abi3.so
    _flashmla_C.abi3.so            vllm/_flashmla_C.abi3.so
    sgl_flashmla_ops.abi3.so       sgl_kernel/flashmla_ops.abi3.so of the wheel sglang-kernel 0.4.4
    triton_peers/mla_sparse.py     the function `triton_bf16_mla_sparse_interface` of vLLM and the
                                   kernel that it launches, with their imports
    triton_peers/indexer_q.py      the function `_fused_indexer_q_rope_quant_kernel` of
                                   vllm/model_executor/layers/sparse_attn_indexer.py, with its
                                   imports of triton
    fi_topk.so                     FlashInfer's top-k behind C functions of plain arguments, made
                                   of the headers of the wheel flashinfer-python 0.6.14 by

    nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler -fPIC \\
        --expt-relaxed-constexpr -I flashinfer/data/include -I EMPTY -o fi_topk.so fi_topk.cu

The source is benchmarks/fi_topk.cu. EMPTY holds tvm/ffi/error.h, which may be an empty file.

vLLM itself is not imported: loading the library registers its operators with torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


def vllm_cache_ops(folder: Path | None) -> Any | None:
    """`torch.ops._C_cache_ops` of vLLM; None, said once, where the library cannot be loaded."""
    return torch.ops._C_cache_ops if _vllm_is_loaded(folder) else None


def vllm_ops(folder: Path | None) -> Any | None:
    """`torch.ops._C` of vLLM; None, said once, where the library cannot be loaded."""
    return torch.ops._C if _vllm_is_loaded(folder) else None


@cache
def _vllm_is_loaded(folder: Path | None) -> bool:
    """Load vLLM's library of operators, unless it is not there."""
    path = _found(folder, "_C_stable_libtorch.abi3.so")
    if path is None:
        return False
    return _is_loaded(path)


def _is_loaded(path: Path) -> bool:
    """Load a library of operators; False, said, where that fails."""
    _load_cuda_libraries()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        print(f"peer left out: {path.name}: {error}", flush=True)
        return False
    return True


@cache
def flashinfer_topk(folder: Path | None) -> Any | None:
    """FlashInfer's top-k as a C library; None, said once, where it is absent."""
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


@cache
def vllm_sparse_mla(folder: Path | None) -> Any | None:
    """vLLM's sparse MLA in Triton, for bfloat16 latents; None where it is absent."""
    path = _found(folder, "triton_peers/mla_sparse.py")
    return None if path is None else _module(path).triton_bf16_mla_sparse_interface


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
