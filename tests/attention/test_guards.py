"""Misuse of the backend: named errors, nothing built twice, nothing read before it is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.attention import CacheLayout, StepHints
from fd_dsa.errors import ConfigError, MissingStepError, ShapeError
from tests.attention.harness import INDEX_DIM, RANK, ROPE, Sizes, World
from tests.strategies import make_batch

ROWS = [(3, 2, 3), (0, 9, 1)]
INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")


@pytest.fixture
def world() -> World:
    batch = make_batch(ROWS, 16)
    made = World(Sizes(layers=2), batch.block_tables, [5, 10], batch.num_blocks, 16)
    for row, (_, cached, _) in enumerate(ROWS):
        made.remember(row, 0, cached)
    return made


def given(world: World, **changes: Any) -> dict[str, Any]:
    """Return the projections of layer 0 with some of them replaced."""
    names = ("q", "latent", "k_pe", "index_q", "index_k", "weights")
    return {name: world.packed(0, ROWS, 0, name) for name in names} | changes


def write(world: World, meta: Any, **changes: Any) -> None:
    world.write(given(world, **changes), 0, meta)


def select(world: World, meta: Any, **changes: Any) -> Any:
    arguments = given(world, **changes)
    return world.backend.select(arguments["index_q"], arguments["weights"], 0, meta)


def attend(world: World, meta: Any, slots: Any = None, **changes: Any) -> Any:
    slots = paddle.full([4, 1, 8], -1, "int32") if slots is None else slots
    return world.backend.attend(given(world, **changes)["q"], slots, 0, meta)


def test_step_metadata_hangs_on_the_forward_meta(world: World) -> None:
    assert world.backend.attention_metadata is None
    for rows, offsets in ((ROWS, [0, 3, 0, 4, 0, 5, 0, 0]), ([(0, 2, 1), (0, 9, 1)], None)):
        meta = world.begin(rows)
        step = meta.fd_dsa_step
        assert world.backend.attention_metadata is step
        for name in ("position_ids", "slot_mapping", "indexer_attn_mask_offsets"):
            assert getattr(meta, name) is getattr(step, name)
        windows = meta.indexer_attn_mask_offsets
        assert (windows if windows is None else windows.numpy().tolist()) == offsets
        # decode-only steps have none
        assert (step.cu_seqlens_kg is None) == (offsets is None)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("how", ["none", "absent"])
def test_missing_inputs_say_what_comes_first(world: World, name: str, how: str) -> None:
    meta = world.forward_meta(ROWS)
    if how == "none":
        setattr(meta, name, None)
    else:
        delattr(meta, name)
    with pytest.raises(MissingStepError, match=rf"{name}.*initialize_forward_meta must fill"):
        world.backend.init_attention_metadata(meta)
    assert getattr(meta, "fd_dsa_step", None) is None
    assert world.backend.builder.num_builds == 0


@pytest.mark.parametrize("call", [write, select, attend])
def test_layers_before_the_metadata(world: World, call: Any) -> None:
    with pytest.raises(MissingStepError, match=r"init_attention_metadata.*must be called first"):
        call(world, world.forward_meta(ROWS))


@pytest.mark.parametrize("caches", [None, [None] * 4])
@pytest.mark.parametrize("call", [write, select, attend])
def test_caches_not_allocated(world: World, call: Any, caches: Any) -> None:
    meta = world.begin(ROWS)
    meta.caches = caches
    with pytest.raises(MissingStepError, match="caches"):
        call(world, meta)


def test_no_selection(world: World) -> None:
    q = given(world)["q"]
    with pytest.raises(MissingStepError, match="select of this layer"):
        world.backend.attend(q, None, 0, world.begin(ROWS))


@pytest.mark.parametrize("call", [write, select, attend])
def test_layers_on_the_step_before(world: World, call: Any) -> None:
    old = world.begin(ROWS)
    world.begin(ROWS)
    before = [np.from_dlpack(cache).copy() for cache in world.caches]
    with pytest.raises(MissingStepError, match=r"another step.*must be called first"):
        call(world, old)
    for cache, kept in zip(world.caches, before, strict=True):
        np.testing.assert_array_equal(np.from_dlpack(cache), kept)


def test_a_refused_step_is_no_step(world: World) -> None:
    meta = world.begin(ROWS)
    bad = world.forward_meta(ROWS)
    bad.seq_lens_decoder[1] = -4
    with pytest.raises(ValueError, match="seq_lens_decoder: row 1 is -4"):
        world.backend.init_attention_metadata(bad)
    assert getattr(bad, "fd_dsa_step", None) is None
    with pytest.raises(MissingStepError):
        attend(world, bad)
    # the step before is still whole
    assert meta.position_ids.numpy().tolist() == [2, 3, 4, 9]
    attend(world, meta)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seq_lens_encoder", np.zeros(3, np.int32), r"seq_lens_encoder.*\(3,\).*\(2,\)"),
        ("seq_lens_decoder", np.zeros(1, np.int32), r"seq_lens_decoder.*\(1,\).*\(2,\)"),
        ("block_tables", np.zeros((3, 1), np.int32), r"block_tables.*\(3, 1\).*2"),
        ("block_tables", np.zeros((2, 7), np.int32), r"block_tables.*\(2, 7\).*1"),
    ],
)
def test_inputs_of_another_shape(world: World, name: str, value: Any, said: str) -> None:
    meta = world.forward_meta(ROWS)
    setattr(meta, name, value)
    with pytest.raises(ShapeError, match=said):
        world.backend.init_attention_metadata(meta)
    assert world.backend.builder.num_builds == 0


@pytest.mark.parametrize(
    ("call", "changes", "said"),
    [
        (write, {"index_k": paddle.zeros([3, INDEX_DIM])}, r"\[3, 4\].*\[4, \*\]"),
        (write, {"index_k": paddle.zeros([4, 5])}, r"index_cache.*16, 4\].*5\]"),
        (write, {"latent": paddle.zeros([4, RANK + 1])}, r"latent_cache.*8\].*9\]"),
        (attend, {"q": paddle.zeros([4, 2, 5])}, r"\[4, 2, 5\].*\[\*, \*, 8\]"),
        (attend, {"slots": paddle.full([3, 8], -1, "int32")}, r"\[3, 8\].*\[4, \*\]"),
    ],
)
def test_layer_arguments_of_another_shape(world: World, call: Any, changes: Any, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        call(world, world.begin(ROWS), **changes)


def test_hints_must_agree_with_the_step(world: World) -> None:
    world.backend.set_step_hints(StepHints(9, 3, 10))
    with pytest.raises(ValueError, match="num_tokens: got 9, the lengths of the rows say 4"):
        world.backend.init_attention_metadata(world.forward_meta(ROWS))
    # hints serve one step only
    world.backend.init_attention_metadata(world.forward_meta(ROWS))
    assert world.backend.builder.num_builds == 1


def test_longest_row_may_be_an_upper_bound(world: World) -> None:
    world.backend.set_step_hints(StepHints(4, 3, 12))
    meta = world.forward_meta(ROWS)
    world.backend.init_attention_metadata(meta)
    write(world, meta)
    # a copy: the selection's buffer serves the next layer too
    slots = select(world, meta).numpy()
    np.testing.assert_array_equal(slots, world.run(ROWS).slots[0])


def test_tensors_serve_as_inputs(world: World) -> None:
    meta = world.forward_meta(ROWS)
    for name in INPUTS:
        setattr(meta, name, paddle.to_tensor(getattr(meta, name)))
    world.backend.init_attention_metadata(meta)
    assert meta.slot_mapping.numpy().tolist() == world.begin(ROWS).slot_mapping.numpy().tolist()


def test_selection_may_have_upstream_s_middle_axis(world: World) -> None:
    meta = world.begin(ROWS)
    slots = select(world, meta)
    flat = attend(world, meta, slots).numpy().copy()
    np.testing.assert_array_equal(attend(world, meta, slots.unsqueeze(1)).numpy(), flat)


@pytest.mark.parametrize(
    ("dtype", "itemsize", "rows"),
    [("float32", 4, (576, 128)), ("bfloat16", 2, (576, 128)), ("fp8_ds_mla", 1, (656, 132))],
)
def test_cache_shapes_and_bytes(dtype: str, itemsize: int, rows: tuple[int, int]) -> None:
    layout = CacheLayout(dtype, 64, 512, 64, 128)
    assert layout.latent_shape(7) == [7, 1, 64, rows[0]]
    assert layout.indexer_shape(7) == [7, 64, rows[1]]
    # DeepSeek-V3.2, and GLM-5.2 with 21 full layers of 78
    for full, layers in ((61, 61), (21, 78)):
        expected = (layers * rows[0] + full * rows[1]) * 64 * itemsize
        assert layout.bytes_per_block(layers, full) == expected
    latent = layout.allocate(layout.latent_shape(2))
    assert latent.shape == [2, 1, 64, rows[0]]
    assert latent.numpy().itemsize == itemsize
    assert not latent.numpy().any()


def test_a_layer_that_shares_a_selection_has_no_index_cache(world: World) -> None:
    latent, index, shared, none = world.backend.allocate_caches([True, False])
    num_blocks = world.num_blocks
    assert latent.shape == shared.shape == [num_blocks, 1, 16, RANK + ROPE]
    assert index.shape == [num_blocks, 16, INDEX_DIM] and none is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "'fp8'.*float32, bfloat16, fp8_ds_mla"),
        ({"block_size": 32}, "block_size: got 32; must be 64"),
        ({"kv_lora_rank": 256}, "kv_lora_rank: got 256; must be 512"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim: got 32; must be 64"),
        ({"index_head_dim": 64}, "index_head_dim: got 64; must be 128"),
        ({"index_scale_fmt": "float32"}, "index_scale_fmt: got 'float32', allowed are 'ue8m0'"),
        (
            {"kv_cache_dtype": "float32", "index_head_dim": 64, "index_hadamard": True},
            "index_head_dim: got 64; must be 128",
        ),
    ],
)
def test_cache_layouts_that_do_not_exist(fields: dict[str, Any], message: str) -> None:
    plain = CacheLayout("fp8_ds_mla", 64, 512, 64, 128)
    with pytest.raises(ConfigError, match=message):
        replace(plain, **fields)
