"""FlashMLA and DeepGEMM as packages of their own names, from files of the vllm 0.26.0 wheel.

A folder for `--peers` holds beside what `_peers` names:

    _flashmla_C.abi3.so      vllm/_flashmla_C.abi3.so
    deep_gemm/               vllm/third_party/deep_gemm/, with the _C of this Python alone

vLLM itself is not imported. FlashMLA's operator gets the Python interface of its own project
(deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py), as far as sparse decoding goes. DeepGEMM
compiles its kernels with nvcc when they are first used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks._peers import _found, _is_loaded


def register(folder: Path | None, cache: Path) -> list[str]:
    """Make the packages importable under their names; returns those that are there.

    Args:
        folder: of the peers.
        cache: where DeepGEMM keeps what it compiled.
    """
    found = []
    library = _found(folder, "_flashmla_C.abi3.so")
    if library is not None and _is_loaded(library):
        sys.modules["flash_mla"] = _flash_mla()
        found.append("flash_mla")
    if _found(folder, "deep_gemm/__init__.py") is not None:
        os.environ.setdefault("DG_JIT_CACHE_DIR", str(cache))
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        found.append("deep_gemm")
    return found


@contextmanager
def hidden() -> Iterator[None]:
    """Neither package is there for what is made inside."""
    names = "flash_mla", "deep_gemm"
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules |= dict.fromkeys(names)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules |= before


@dataclass
class Schedule:
    """A schedule, empty until the first call that it is given to."""

    tiles: torch.Tensor | None = None
    splits: torch.Tensor | None = None


def _flash_mla() -> ModuleType:
    """The package around vLLM's build of the operator."""
    module: Any = ModuleType("flash_mla")
    module.get_mla_metadata = lambda *args, **kwargs: (Schedule(), None)
    module.flash_mla_with_kvcache = _with_kvcache
    return module


def _with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: None,
    cache_seqlens: None,
    head_dim_v: int,
    tile_scheduler_metadata: Schedule,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [b, s_q, h_q, 512] over selected slots, and the logarithms of its sums."""
    assert isinstance(tile_scheduler_metadata, Schedule) and num_splits is None
    assert is_fp8_kvcache and not causal and indices is not None
    schedule = tile_scheduler_metadata
    out, lse, schedule.tiles, schedule.splits = torch.ops._flashmla_C.sparse_decode_fwd(
        q, k_cache, indices, None, None, schedule.tiles, schedule.splits, None, None, None,
        head_dim_v, softmax_scale, None,
    )  # fmt: skip
    return out, lse
