"""Kernels of other projects, for a comparison in the same process.

A folder for `--peers` holds, taken out of the wheel vllm 0.26.0 (built for torch 2.11):

    _C_stable_libtorch.abi3.so     vllm/_C_stable_libtorch.abi3.so
    triton_peers/indexer_q.py      the function `_fused_indexer_q_rope_quant_kernel` of
                                   vllm/model_executor/layers/sparse_attn_indexer.py, with its
                                   imports of triton

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


@cache
def vllm_cache_ops(folder: Path | None) -> Any | None:
    """`torch.ops._C_cache_ops` of vLLM; None, said once, where the library cannot be loaded."""
    path = _found(folder, "_C_stable_libtorch.abi3.so")
    if path is None:
        return None
    _load_cuda_libraries()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        print(f"peer left out: {path.name}: {error}", flush=True)
        return None
    return torch.ops._C_cache_ops


@cache
def vllm_indexer_query(folder: Path | None) -> Any | None:
    """The Triton kernel of vLLM that prepares the indexer's query; None where it is absent."""
    path = _found(folder, "triton_peers/indexer_q.py")
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location("vllm_indexer_q", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._fused_indexer_q_rope_quant_kernel


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
