"""Damaged files and contradicting indices are refused with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import CheckpointError, ConfigError
from fd_dsa.models.checkpoint import Checkpoint
from tests.models.folders import f32, header_of, write_raw, write_safetensors, write_shards

TENSORS = {"a": f32(np.arange(6).reshape(2, 3)), "b": f32(np.arange(4))}
DATA = b"".join(tensor.data for tensor in TENSORS.values())


def refusal(folder: Path) -> str:
    """The one-line message with which a folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 7, 8, 50, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert str(path) in message
    assert "truncated" in message


def test_truncation_says_expected_and_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    assert f"expected {size} bytes, found {size - 5}" in refusal(tmp_path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes() + b"xyz")
    assert "3 bytes follow its last tensor" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"not json", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": {}, "a": {}}', "'a' is there twice"),
        (b'{"a": 5}', "'a' lacks dtype"),
        (b'{"a": {"dtype": "F32"}}', "'a' lacks dtype"),
    ],
)
def test_garbage_header(tmp_path: Path, header: bytes, text: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, b"")
    assert text in refusal(tmp_path)


def test_absurd_header_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 64)
    assert "claims 18446744073709551615 bytes" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": "F31"}, "unknown dtype 'F31'"),
        ({"dtype": 4}, "unknown dtype 4"),
        ({"shape": [2, -3]}, "shape [2, -3]"),
        ({"shape": "23"}, "shape '23'"),
        ({"shape": [2, True]}, "shape [2, True]"),
        ({"shape": [3, 3]}, "takes 36 bytes, data_offsets [0, 24] give 24"),
        ({"dtype": "F64"}, "takes 48 bytes"),
        ({"data_offsets": [0]}, "data_offsets [0]"),
        ({"data_offsets": [24, 0]}, "data_offsets [24, 0] give -24"),
        ({"data_offsets": [4, 28]}, "'a' begins at byte"),
    ],
)
def test_wrong_entry_of_the_header(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    header = header_of(TENSORS)
    header["a"] |= change
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), DATA)
    message = refusal(tmp_path)
    assert text in message
    assert "tensor 'a'" in message or "tensor 'b'" in message


def test_overlapping_tensors(tmp_path: Path) -> None:
    header = header_of(TENSORS)
    header["b"]["data_offsets"] = [16, 32]
    write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), DATA)
    assert "tensor 'b' begins at byte" in refusal(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_single_file_and_index_at_once(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    write_shards(tmp_path, TENSORS, 2)
    assert "holds both" in refusal(tmp_path)


def _rename_tensor(folder: Path, weight_map: dict[str, Any]) -> str:
    weight_map["c"] = weight_map.pop("b")
    return "tensor 'c': expected in model-00002-of-00002.safetensors, found in no shard"


def _forget_tensor(folder: Path, weight_map: dict[str, Any]) -> str:
    write_shards(folder, TENSORS | {"c": TENSORS["a"]}, 2)
    return "tensor 'c' is not in model.safetensors.index.json (1 such)"


def _wrong_shard(folder: Path, weight_map: dict[str, Any]) -> str:
    weight_map["extra"] = weight_map["b"]
    weight_map["b"] = weight_map["a"]
    return "tensor 'b': expected in model-00001-of-00002.safetensors, found in model-00002"


def _missing_shard(folder: Path, weight_map: dict[str, Any]) -> str:
    (folder / weight_map["b"]).unlink()
    return "names the shard model-00002-of-00002.safetensors, which is not in the folder"


def _tensor_in_two_shards(folder: Path, weight_map: dict[str, Any]) -> str:
    write_safetensors(folder / weight_map["b"], TENSORS)
    return "tensor 'a' is in model-00001-of-00002.safetensors too"


def _shard_outside(folder: Path, weight_map: dict[str, Any]) -> str:
    weight_map["b"] = "../elsewhere.safetensors"
    return "weight_map.b: got '../elsewhere.safetensors', allowed: a file name in the folder"


def _shard_without_name(folder: Path, weight_map: dict[str, Any]) -> str:
    weight_map["b"] = 3
    return "weight_map.b: got 3"


def _empty_map(folder: Path, weight_map: dict[str, Any]) -> str:
    weight_map.clear()
    return "weight_map: got {}"


def _damaged_shard(folder: Path, weight_map: dict[str, Any]) -> str:
    path = folder / weight_map["b"]
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: truncated"


@pytest.mark.parametrize(
    "damage",
    [
        _rename_tensor,
        _forget_tensor,
        _wrong_shard,
        _missing_shard,
        _tensor_in_two_shards,
        _shard_outside,
        _shard_without_name,
        _empty_map,
        _damaged_shard,
    ],
)
def test_index_and_shards_that_disagree(
    tmp_path: Path, damage: Callable[[Path, dict[str, Any]], str]
) -> None:
    write_shards(tmp_path, TENSORS, 2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    expected = damage(tmp_path, index["weight_map"])
    index_path.write_text(json.dumps(index))
    assert expected in refusal(tmp_path)


def test_index_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON") as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value)
