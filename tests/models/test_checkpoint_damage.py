"""Damaged files and contradicting indices are refused with the file's name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.config import EngineConfig
from fd_dsa.errors import CheckpointError, ConfigError, FdDsaError
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.startup.plan import make_plan
from tests.models.folders import f32, header_of, write_raw, write_safetensors, write_shards
from tests.parity.cases import CASES
from tests.v4_model.cases import write_tokenizer

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


def test_a_header_with_a_tensor_twice(tmp_path: Path) -> None:
    entry = json.dumps(header_of(TENSORS)["a"]).encode()
    path = tmp_path / "model.safetensors"
    write_raw(path, SOUND[:-1] + b', "a": ' + entry + b"}", DATA)
    assert refusal(tmp_path).startswith(f"{path}: header: the name 'a' is there twice")


def test_a_header_of_very_many_tensors_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, b":" * 4_000_000, DATA)
    start = f"{path}: has about 1000000 tensors, allowed: at most 524288"
    assert refusal(tmp_path).startswith(start)


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "model.safetensors: is no regular file" in refusal(tmp_path)


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
    index = {"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(TENSORS)


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
# what the index says of tensors, and the message
INDICES: dict[str, tuple[dict[str, Any], str]] = {
    "renamed": ({"a": FIRST, "c": SECOND}, f"tensor 'c': expected in {SECOND}, found in no shard"),
    "wrong shard": (
        {"a": FIRST, "b": FIRST, "extra": SECOND},
        f"tensor 'b': expected in {FIRST}, found in {SECOND}",
    ),
    "no such shard": (
        {"a": FIRST, "b": "x.safetensors"},
        "names the shard x.safetensors, which is not in the folder",
    ),
    "outside": (
        {"a": FIRST, "b": "../elsewhere.safetensors"},
        "weight_map.b: got '../elsewhere.safetensors', allowed: a file name in the folder",
    ),
    "no name": ({"a": FIRST, "b": 3}, "weight_map.b: got 3"),
    "empty": ({}, "weight_map: got {}"),
}


@pytest.mark.parametrize(("weight_map", "text"), INDICES.values(), ids=INDICES)
def test_index_and_shards_that_disagree(
    tmp_path: Path, weight_map: dict[str, Any], text: str
) -> None:
    write_shards(tmp_path, TENSORS, 2)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert text in refusal(tmp_path)


def test_shards_that_are_damaged_or_hold_other_tensors(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 2)
    path = tmp_path / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: {TRUNCATED}{path.stat().st_size} bytes)" in refusal(tmp_path)
    write_safetensors(path, TENSORS)
    assert f"tensor 'a' is in {FIRST} too" in refusal(tmp_path)
    write_safetensors(path, {"b": TENSORS["b"], "c": TENSORS["a"]})
    assert "tensor 'c' is not in model.safetensors.index.json (1 such)" in refusal(tmp_path)


def test_index_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON") as caught:
        Checkpoint.open(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "hf_quant_config.json",
        "model.safetensors",
        "mtp.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_a_link_whose_target_is_missing_is_no_absent_file(tmp_path: Path, name: str) -> None:
    """Downloads of a hub are links into its cache, from which files may vanish."""
    folder = write_tokenizer(CASES["v32"].write(tmp_path))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(FdDsaError) as caught:
        make_plan(EngineConfig(model=folder, device="cpu"))
    message = f"{folder / name}: is a link to '../blobs/gone', which is missing; fetch it again"
    assert str(caught.value) == message
