"""Keys that an upstream layer has normed and rotated itself, as bfloat16 tensors of the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.ops.cache_write import CacheWriteParams, bfloat16_bits
from fd_dsa.ops.cache_write import write_on_host as cpu_cache_write
from tests.attention.bfloat16_case import DIM, RANK, ROPE, Bfloat16World, rounded
from tests.attention.harness import FinishedKeys
from tests.gpu_rig import Rig
from tests.kernel_memory import open_memory
from tests.strategies import make_batch

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

ROWS = [(3, 62, 3), (0, 5, 2), (0, 0, 0)]
NUM_TOKENS = 5


def test_keys_of_an_upstream_layer(rig: Rig) -> None:
    memory = open_memory("rig")
    world = Bfloat16World(memory, make_batch(ROWS, 64), heads=16)
    rng = np.random.default_rng(5)

    def numbers(*shape: int) -> np.ndarray:
        return rounded(rng.standard_normal((NUM_TOKENS, *shape)).astype(np.float32))

    def put(array: np.ndarray) -> Any:
        return memory.put(bfloat16_bits(array).view(np.uint16), "bfloat16")

    latent, k_pe, index_k = numbers(RANK), numbers(1, ROPE), numbers(DIM)
    meta, backend = SimpleNamespace(caches=world.caches), world.backend
    inputs = [memory.put(array) for array in world.inputs(world.rows)]
    backend.build_step(meta, inputs, world.hints(world.rows, padding=0))
    codes = memory.put(np.full((NUM_TOKENS, 4, DIM), 0x38, np.uint8))
    weights = memory.put(np.ones((NUM_TOKENS, 4), np.float32))
    rows = np.concatenate([latent, k_pe[:, 0]], axis=1)
    backend.write(put(rows), put(index_k), None, FinishedKeys(0), meta)
    slots, q = backend.select(codes, weights, 0, meta), put(numbers(16, RANK + ROPE))
    out = memory.get(backend.attend(q, slots.unsqueeze(1), 0, meta))

    slot_mapping = world.metadata(world.rows).slot_mapping
    plain = CacheWriteParams("fp8_ds_mla")
    cpu_cache_write(rows, index_k, None, slot_mapping, None, *world.wanted, plain)
    for found, wanted in zip(world.caches, world.wanted, strict=True):
        np.testing.assert_array_equal(memory.get(found), wanted)
    assert out.dtype == np.uint16
    again = backend.attend(q, slots, 0, meta)
    np.testing.assert_array_equal(memory.get(again), out)
