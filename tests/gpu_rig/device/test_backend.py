"""DSAAttentionBackend on the device: any step as on the CPU, and a decode step takes nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.attention import DSAAttentionBackend, StepHints
from fd_dsa.ops.arrays import as_numpy
from tests.attention.harness import FP8, FinishedKeys, Sizes, World
from tests.gpu_rig import Rig
from tests.ops.e4m3 import E4M3_VALUES
from tests.strategies import StepBatch, make_batch

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

PADDING = 2
# a first chunk below the selection of 8 and one past it, a later chunk, decode, drafts, an idle row
MIXED = [(2, 0, 2), (9, 0, 9), (3, 23, 3), (0, 0, 0), (0, 40, 1), (0, 6, 2)]
DECODE = [(0, 40, 1), (0, 6, 1), (0, 0, 0), (0, 33, 1)]
DTYPES = ("float32", "bfloat16", FP8)


class DeviceWorld(World):
    """A world whose backend, caches and activations are on the device."""

    def __init__(self, batch: StepBatch, sizes: Sizes, place: Any) -> None:
        lengths = (batch.seq_lens_decoder + batch.seq_lens_this_time).tolist()
        tokens = batch.num_tokens + PADDING
        super().__init__(sizes, batch.block_tables, lengths, batch.num_blocks, tokens)
        for row, cached in enumerate(batch.seq_lens_decoder.tolist()):
            self.remember(row, 0, cached)
        self.place = place
        self.caches = [self.put(as_numpy(cache)) for cache in self.caches]
        device = f"{place.get_device_type()}:0"
        self.backend = DSAAttentionBackend(self.backend.config, device)

    def put(self, array: np.ndarray) -> Any:
        """A copy on the device."""
        return paddle.to_tensor(array, place=self.place)

    def packed(self, layer: int, rows: Any, padding: int, name: str) -> Any:
        """As of a World, on the device; queries of an FP8 indexer as codes."""
        array = super().packed(layer, rows, padding, name).numpy()
        if name == "index_q" and self.sizes.dtype == FP8:
            codes = np.searchsorted(E4M3_VALUES[:127], np.abs(array))
            array = (codes | np.where(array < 0, 0x80, 0)).astype(np.uint8)
        return self.put(array)

    def check(self, rows: Any, step: Any, padding: int = 0, only: Any = None) -> None:
        """As of a World; what is past the longest row is -1."""
        longest = max(cached + new for _, cached, new in rows)
        for slots in step.slots:
            assert (slots[:, min(longest, self.sizes.topk) :] == -1).all()
        super().check(rows, step, padding, only)


def sizes_of(dtype: str) -> Sizes:
    """Of two layers with a selection of 8."""
    return Sizes(8, 64 if dtype == FP8 else 16, dtype, layers=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_step(rig: Rig, dtype: str) -> None:
    sizes = sizes_of(dtype)
    world = DeviceWorld(make_batch(MIXED, sizes.block_size), sizes, rig.place)
    world.check(MIXED, world.run(MIXED, PADDING), PADDING)


def test_device_tensors_and_hints_in_place_of_host_arrays(rig: Rig) -> None:
    sizes = sizes_of("float32")
    world = DeviceWorld(make_batch(MIXED, 16), sizes, rig.place)
    original = world.forward_meta

    def on_device(rows: Any, **more: Any) -> SimpleNamespace:
        meta = original(rows, **more)
        for name in ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables"):
            setattr(meta, name, world.put(getattr(meta, name)))
        return meta

    world.forward_meta = on_device
    # `begin` gives the hints where a step is padded
    world.check(MIXED, world.run(MIXED, PADDING), PADDING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [8, 64], ids=["scored", "short"])
def test_a_decode_step_copies_nothing_and_takes_no_memory(rig: Rig, dtype: str, topk: int) -> None:
    sizes = Sizes(topk, 64 if dtype == FP8 else 16, dtype)
    batch = make_batch(DECODE, sizes.block_size)
    world = DeviceWorld(batch, sizes, rig.place)
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")
    inputs = {name: world.put(getattr(batch, name)) for name in names}
    given = {
        name: world.packed(0, DECODE, 0, name)
        for name in ("q", "latent", "k_pe", "index_q", "index_k", "weights")
    }
    kv_a = paddle.concat([given["latent"], given["k_pe"]], axis=1)
    cos_sin = world.put(np.ones((len(given["q"]), sizes.widths[1]), np.float32))
    layer = FinishedKeys(0)
    outputs = []

    def step() -> None:
        meta = SimpleNamespace(**inputs, caches=world.caches, attn_backend=world.backend)
        world.backend.set_step_hints(StepHints(3, 0, 41))
        world.backend.init_attention_metadata(meta)
        world.backend.write(kv_a, given["index_k"], cos_sin, layer, meta)
        slots = world.backend.select(given["index_q"], given["weights"], 0, meta)
        out = world.backend.attend(given["q"], slots, 0, meta)
        outputs.append((slots, out))

    # views are made, and kernels compiled, when a size is first seen
    step()
    with rig.strict(), rig.counting() as counted:
        step()
    assert counted.delta == {}
    first, second = outputs
    assert first[0].data_ptr() == second[0].data_ptr()
    assert first[1].data_ptr() == second[1].data_ptr()
    assert np.isfinite(second[1].numpy()).all()
