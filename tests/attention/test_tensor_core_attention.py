"""Our sparse MLA on tensor cores as a DeviceAttention would hold it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fd_dsa.attention.config import DSABackendConfig
from fd_dsa.cache_formats import CacheLayout
from tests.kernel_memory import KernelMemory
from tests.ops.tensor_core_case import RANK, SCALE, make


def config(cache: str = "fp8_ds_mla", **changes: Any) -> DSABackendConfig:
    found = DSABackendConfig(
        num_heads=5,
        index_n_heads=32,
        index_topk=64,
        softmax_scale=SCALE,
        cache_layout=CacheLayout(cache, 64, RANK, 64, 128),
        max_num_seqs=4,
        max_num_tokens=8,
        max_blocks_per_seq=2,
        dtype="bfloat16",
    )
    return replace(found, **changes)


@pytest.mark.parametrize("heads", [5, 40])
def test_layers_share_what_is_allocated_once(kernel_memory: KernelMemory, heads: int) -> None:
    from fd_dsa.ops.mla.tensor_core import TensorCoreAttention

    m, made = kernel_memory, []

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        made.append(shape)
        return m.poisoned(shape, dtype)

    attention = TensorCoreAttention(heads, SCALE, allocate)
    assert made
    made.clear()
    for counts in ([130], [3, 0]):
        case = make("fp8_ds_mla", counts, 130, heads=heads)
        out = m.poisoned((len(counts), heads, RANK), "float32")
        lse = m.poisoned((len(counts), heads), "float32")
        attention.attend(*case.inputs(m), out, lse)
        case.check(m.get(out), m.get(lse))
    assert not made


@pytest.mark.parametrize(
    ("changes", "capability", "attention", "scores"),
    [
        ({}, 90, None, None),
        ({"cache": "bfloat16"}, 90, None, None),
        ({"cache": "bfloat16", "dtype": "float32"}, 90, "activations", "queries of float32"),
        ({}, 80, "capability 80", None),
        ({}, 100, "capability 100", None),
        ({"dtype": "float32"}, 90, "activations are float32", None),
        ({"cache": "float32"}, 90, "the cache is float32", "the cache is float32"),
        (
            {"cache_layout": CacheLayout("bfloat16", 64, 256, 64, 128)},
            90,
            "latents of 256",
            None,
        ),
        (
            {"cache_layout": CacheLayout("bfloat16", 16, 512, 64, 64)},
            90,
            None,
            "blocks of 16 keys, it reads 64 and 32",
        ),
        ({"index_n_heads": 129}, 90, None, "129 index heads"),
    ],
)
def test_what_tensor_cores_do_not_serve(
    changes: dict[str, Any], capability: int, attention: str | None, scores: str | None
) -> None:
    from fd_dsa.attention.device_scores import tiles_unsupported_reason
    from fd_dsa.ops.mla.tensor_core import unsupported_reason

    sizes = config(**changes)
    assert (attention or "") in (found := unsupported_reason(capability, *sizes.kernel_types) or "")
    assert bool(found) == bool(attention)
    assert (scores or "") in (found := tiles_unsupported_reason(sizes.indexer) or "")
    assert bool(found) == bool(scores)


def test_a_cache_of_pages(kernel_memory: KernelMemory) -> None:
    from fd_dsa.ops.mla.tensor_core import TensorCoreAttention

    m, case = kernel_memory, make("int16", [20], 20, heads=3)
    attention = TensorCoreAttention(3, SCALE, m.poisoned)
    q, _, slots = case.inputs(m)
    pages = m.put(np.ascontiguousarray(case.cache).reshape(4, 1, 64, -1))
    out, lse = m.poisoned((1, 3, RANK), "float32"), m.poisoned((1, 3), "float32")
    attention.attend(q, pages, slots, out, lse)
    case.check(m.get(out), m.get(lse))
