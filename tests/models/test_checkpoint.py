"""Tensors of every stored type come back as float32, from one file or from shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fd_dsa.errors import CheckpointError
from fd_dsa.models.checkpoint import Checkpoint
from tests.models.folders import bf16, f8, f16, f32, write_safetensors, write_shards
from tests.ops.e4m3 import E4M3_VALUES

RNG = np.random.default_rng(7)


def open_with(folder: Path, **tensors: object) -> Checkpoint:
    write_safetensors(folder / "model.safetensors", tensors)  # type: ignore[arg-type]
    return Checkpoint.open(folder)


def test_float32_is_a_read_only_view_of_the_file_unless_at_an_odd_offset(tmp_path: Path) -> None:
    values = RNG.standard_normal((5, 3)).astype(np.float32)
    for before, is_view in ((f32(values[:1]), True), (f8(np.zeros((1, 3))), False)):
        read = open_with(tmp_path, a=before, w=f32(values)).tensor("w").float32()
        assert read.dtype == np.float32 and read.flags.aligned
        np.testing.assert_array_equal(read, values)
        assert not is_view or not (read.flags.writeable or read.flags.owndata)


def test_bfloat16_is_exact(tmp_path: Path) -> None:
    # every bfloat16 there is, with both zeros, infinities, denormals and NaN
    bits = np.arange(1 << 16, dtype=np.uint32).reshape(256, 256) << 16
    values = bits.view(np.float32)
    read = open_with(tmp_path, w=bf16(values)).tensor("w").float32()
    np.testing.assert_array_equal(read.view(np.uint32), bits)


def test_float16_is_exact(tmp_path: Path) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    read = open_with(tmp_path, w=f16(values)).tensor("w").float32()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "block"),
    [((16, 16), (16, 16)), ((129, 257), (128, 128)), ((7, 5), (2, 3)), ((1, 1), (128, 128))],
)
def test_fp8_blocks_with_ragged_ends(
    tmp_path: Path, shape: tuple[int, int], block: tuple[int, int]
) -> None:
    codes = RNG.integers(0, 127, shape) if shape != (16, 16) else np.arange(256).reshape(16, 16)
    scales = RNG.uniform(0.5, 2, (-(-shape[0] // block[0]), -(-shape[1] // block[1])))
    scales = scales.astype(np.float32)
    checkpoint = open_with(tmp_path, w=f8(codes), w_scale_inv=f32(scales))
    expected = E4M3_VALUES[codes].astype(np.float32)
    for n, k in np.ndindex(*shape):
        expected[n, k] *= scales[n // block[0], k // block[1]]
    np.testing.assert_array_equal(checkpoint.tensor("w", block).float32(), expected)


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    tensors = {f"t{i}": f32(RNG.standard_normal((i + 1, 2))) for i in range(7)}
    write_shards(tmp_path, tensors, num_shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    # shard by shard, and inside a shard by position
    assert checkpoint.names() == ["t0", "t3", "t6", "t1", "t4", "t2", "t5"]
    for name, tensor in tensors.items():
        assert checkpoint.tensor(name).float32().tobytes() == tensor.data
        info = checkpoint.info(name)
        assert (info.dtype, info.shape, info.nbytes) == ("F32", tensor.shape, len(tensor.data))


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'x' is missing"):
        open_with(tmp_path, w=f32(np.ones(2))).tensor("x")


def test_released_pages_can_be_read_again(tmp_path: Path) -> None:
    values = RNG.standard_normal(5000).astype(np.float32)
    checkpoint = open_with(tmp_path, a=f32(values), b=f32(-values))
    view = checkpoint.tensor("a").float32()
    checkpoint.release("a")
    checkpoint.release("b")
    np.testing.assert_array_equal(view, values)
    np.testing.assert_array_equal(checkpoint.tensor("b").float32(), -values)


def test_views_outlive_the_checkpoint(tmp_path: Path) -> None:
    with open_with(tmp_path, w=f32(np.ones(3))) as checkpoint:
        view = checkpoint.tensor("w").float32()
    np.testing.assert_array_equal(view, np.ones(3, np.float32))
    with pytest.raises(RuntimeError, match="the file is closed"):
        checkpoint.tensor("w").float32()
