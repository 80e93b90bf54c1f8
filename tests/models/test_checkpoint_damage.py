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


def header_with(name: str, **changes: Any) -> bytes:
    """The header of the two tensors with other entries for one of them."""
    header = header_of(TENSORS)
    header[name] |= changes
    return json.dumps(header).encode()


SOUND = header_with("a")
TRUNCATED = "truncated or no sound safetensors file ("
DAMAGE = {
    "missing bytes": (SOUND, DATA[:-5], "incomplete metadata"),
    "more bytes": (SOUND, DATA + b"xyz", "incomplete metadata"),
    "no json": (b"not json", b"", "invalid JSON"),
    "no utf-8": (b"\xff\xfe", b"", "invalid UTF-8"),
    "no object": (b"[]", b"", "invalid JSON"),
    "deep": (b"[" * 100_000, b"", "invalid JSON"),
    "no entries": (b'{"a": {"dtype": "F32"}}', b"", "missing field"),
    "dtype": (header_with("a", dtype="F31"), DATA, "unknown variant `F31`"),
    "wide dtype": (header_with("a", dtype="F64"), DATA, "invalid shape, data type, or offset"),
    "negative": (header_with("a", shape=[2, -3]), DATA, "integer `-3`"),
    "shape": (header_with("a", shape=[3, 3]), DATA, "invalid shape, data type, or offset"),
    "backwards": (header_with("a", data_offsets=[24, 0]), DATA, "offset for tensor `a`"),
    "gap": (header_with("a", data_offsets=[4, 28]), DATA, "offset for tensor `a`"),
    "overlap": (header_with("b", data_offsets=[16, 32]), DATA, "offset for tensor `b`"),
}


@pytest.mark.parametrize(("header", "data", "text"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file(tmp_path: Path, header: bytes, data: bytes, text: str) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    message = refusal(tmp_path)
    assert message.startswith(f"{path}: {TRUNCATED}{path.stat().st_size} bytes)")
    assert text in message and message.endswith("; fetch it again")


@pytest.mark.parametrize("content", [b"", b"abc", SOUND[:50], b"\xff" * 64])
def test_a_file_without_a_whole_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert f"{TRUNCATED}{len(content)} bytes): " in refusal(tmp_path)


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
    return f"{path}: truncated or no sound safetensors file (119 bytes)"


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
