"""The kernels of the write path write every byte of the committed goldens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.kernel_memory import KernelMemory
from tests.ops.fp8_goldens import NAMES, Golden


@pytest.mark.parametrize("name", NAMES)
def test_both_caches(kernel_memory: KernelMemory, name: str) -> None:
    from fd_dsa.ops.cache_write.triton_kernel import write_caches

    m, golden = kernel_memory, Golden.load(name)
    given = golden.write_arguments()
    params = given.pop("params")
    tensors = {key: None if array is None else m.put(array) for key, array in given.items()}
    norms = {
        key: m.put(getattr(params, key))
        for key in ("kv_norm_weight", "k_norm_weight", "k_norm_bias")
        if getattr(params, key) is not None
    }
    with np.errstate(all="ignore"):
        write_caches(**tensors, params=replace(params, **norms))
    for cache in ("latent_cache", "index_cache"):
        np.testing.assert_array_equal(m.get(tensors[cache]), golden.arrays[cache], err_msg=cache)


@pytest.mark.parametrize("name", NAMES)
def test_queries(kernel_memory: KernelMemory, name: str) -> None:
    from fd_dsa.ops.query.triton_kernel import prepare_indexer_query

    m, golden = kernel_memory, Golden.load(name)
    given = golden.query_arguments()
    arrays = {
        key: m.put(given.pop(key)) for key in list(given) if isinstance(given[key], np.ndarray)
    }
    wanted = golden.arrays["q_codes"], golden.arrays["q_weights"]
    out = m.poisoned(wanted[0].shape, "uint8"), m.poisoned(wanted[1].shape, "float32")
    with np.errstate(all="ignore"):
        prepare_indexer_query(**arrays, **given, out=out)
    np.testing.assert_array_equal(m.get(out[0]), wanted[0])
    np.testing.assert_array_equal(m.get(out[1]).view(np.uint32), wanted[1].view(np.uint32))
