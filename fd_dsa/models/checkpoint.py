"""Checkpoint in Hugging Face format: a safetensors file, or shards with an index."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fd_dsa.errors import CheckpointError, shorten, system_reason
from fd_dsa.models.config_reader import (
    describe_missing,
    has_file,
    parse_json,
    read_json_object,
)
from fd_dsa.models.dequantize import FP4, FP4_GROUP, FP8, SCALE_SUFFIX, TensorInfo
from fd_dsa.models.packing import PART_SUFFIXES, Packing
from fd_dsa.models.sources import StoredTensor

__all__ = ["Checkpoint", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
MTP_FILE = "mtp.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LENGTH_BYTES = 8
# the largest releases have 300,000 in more than 100 files
_MAX_TENSORS = 1 << 19
# colons of a header entry: after its name, and in each of its three fields
_ENTRY_COLONS = 4
# max size of a header that the library reads
_MAX_HEADER_BYTES = 100_000_000


class Checkpoint:
    """Tensors of a model folder, mapped but not read. Made by `Checkpoint.open`.

    The safetensors library checks each file's header. The bytes are mapped here, because the
    library returns neither bfloat16 nor FP8 as NumPy arrays, and does not release pages.

    Source: format description of huggingface/safetensors (README, "Format").
    """

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder = folder
        self._maps = {path: _map_file(path) for path in files}
        self._infos: dict[str, TensorInfo] = {}
        for path, mapped in self._maps.items():
            for info in _infos_of(path, mapped):
                if info.name in self._infos:
                    other = self._infos[info.name].file.name
                    raise CheckpointError(f"{path}: tensor {shorten(info.name)} is in {other} too")
                self._infos[info.name] = info

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], name_of: Callable[[str], str] | None = None
    ) -> Checkpoint:
        """Map the weights of a model folder and check their headers.

        A folder with a single file may have another one with the MTP layer.

        Args:
            name_of: name here of a tensor as stored; None = the same.

        Raises:
            CheckpointError: no weights, a missing, truncated or damaged file, a tensor that is
                there twice, or an index that disagrees with its shards.

        Cost: reads the headers only.
        """
        folder = Path(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if not has_file(single) and not has_file(index):
            raise CheckpointError(
                f"{folder}: found neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "weights in the safetensors format are needed"
            )
        if not has_file(index):
            layer = folder / MTP_FILE
            files = [single, layer] if has_file(layer) else [single]
            return cls(folder, files)._renamed(name_of)
        weight_map = _read_weight_map(index)
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        if has_file(single) and single not in shards:
            raise CheckpointError(
                f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, which does not name it; "
                "remove the stale one"
            )
        for path in shards:
            if not has_file(path):
                raise CheckpointError(
                    f"{index}: names the shard {path.name}, which is not in the folder"
                )
        checkpoint = cls(folder, shards)
        checkpoint._check_index(index, weight_map)
        return checkpoint._renamed(name_of)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the mapped files. A view that still lives keeps its file mapped."""
        self._maps.clear()

    def names(self) -> list[str]:
        """Return the names of all tensors, shard by shard, in the order of their bytes."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def find(self, name: str) -> TensorInfo | None:
        """Return dtype, shape and place of a tensor, or None without such a tensor."""
        return self._infos.get(name)

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self._infos[name]

    def raw(self, name: str) -> np.ndarray:
        """Return a read-only view of a tensor's bytes, uint8 [nbytes]."""
        info = self.info(name)
        if not self._maps:
            raise RuntimeError(f"{info.file}: the file is closed")
        return np.frombuffer(self._maps[info.file], np.uint8, info.nbytes, info.offset)

    def are_equal(self, name: str, other: str) -> bool:
        """Return True if two tensors have the same bytes."""
        # buffers are compared without an array of booleans
        equal = self.raw(name).data == self.raw(other).data
        self.release(name)
        self.release(other)
        return equal

    def tensor(
        self,
        name: str,
        weight_block_size: tuple[int, int] | None = None,
        packing: Packing | None = None,
    ) -> StoredTensor:
        """Return a tensor, whose bytes are read when they are used.

        The checkpoint must have passed `validate`.

        Args:
            weight_block_size: rows and columns of a block of an FP8 weight.
            packing: layout of matrices in four bits.

        Raises:
            CheckpointError: unknown name.
        """
        info = self.info(name)
        if packing is not None and info.dtype == packing.dtype:
            ends = (part.removeprefix(name) for part in self.parts(name)[1:])
            parts = {end: StoredTensor(self.info(name + end), self.raw(name + end)) for end in ends}
            return StoredTensor(info, self.raw(name), packing=packing, parts=parts)
        if info.dtype not in (FP8, FP4):
            return StoredTensor(info, self.raw(name))
        scale = self.tensor(name + SCALE_SUFFIX)
        if info.dtype == FP4:
            return StoredTensor(info, self.raw(name), scale, (1, FP4_GROUP))
        assert weight_block_size is not None, name
        return StoredTensor(info, self.raw(name), scale, weight_block_size)

    def parts(self, name: str) -> list[str]:
        """Return the name of a tensor and those of its scales and the like, as far as stored."""
        return [one for end in ("", *PART_SUFFIXES) if (one := name + end) in self]

    def release(self, name: str) -> None:
        """Return the mapped pages of a tensor to the system until the next read."""
        info = self.info(name)
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            start = info.offset - info.offset % mmap.PAGESIZE
            length = info.offset + info.nbytes - start
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, length)

    def _renamed(self, name_of: Callable[[str], str] | None) -> Checkpoint:
        """Give the tensors the names of `name_of`, and return the checkpoint."""
        if name_of is not None:
            infos = {name_of(name): info for name, info in self._infos.items()}
            if len(infos) < len(self._infos):
                twice = next(i for n, i in self._infos.items() if infos[name_of(n)] is not i)
                other = infos[name_of(twice.name)].name
                raise CheckpointError(
                    f"{twice.file}: tensor {shorten(twice.name)} is there twice, also as {other!r}"
                )
            self._infos = infos
        return self

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        """Refuse an index that does not name the shard of each tensor."""
        for name, shard in weight_map.items():
            info = self._infos.get(name)
            if info is None or info.file.name != shard:
                place = "no shard" if info is None else info.file.name
                raise CheckpointError(
                    f"{index}: tensor {shorten(name)}: expected in {shard:.100}, found in {place}"
                )
        extra = self._infos.keys() - weight_map.keys()
        if extra:
            name = min(extra)
            raise CheckpointError(
                f"{self._infos[name].file}: tensor {shorten(name)} is not in {index.name} "
                f"({len(extra)} such)"
            )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read the file name of each tensor from an index."""
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: got {shorten(weight_map)}, allowed: an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map.{name:.100}: got {shorten(shard)}, allowed: a file name in "
                "the folder"
            )
    return weight_map


def _map_file(path: Path) -> mmap.mmap:
    """Check the header of a file and map it for reading."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file; fetch the model's own")
    _check_size(path)
    try:
        # "numpy" makes the library import no tensor library
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {describe_missing(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({system_reason(error)})") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated or no sound safetensors file ({path.stat().st_size} bytes): "
            f"{error}; fetch it again"
        ) from None


def _check_size(path: Path) -> None:
    """Refuse a header of too many tensors, because parsing takes 10 us for each."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            num_tensors = file.read(min(length, _MAX_HEADER_BYTES)).count(b":") // _ENTRY_COLONS
    except OSError:
        # the library reports it
        return
    if num_tensors > _MAX_TENSORS:
        raise CheckpointError(
            f"{path}: has about {num_tensors} tensors, allowed: at most {_MAX_TENSORS} in one file"
        )


def _infos_of(path: Path, mapped: mmap.mmap) -> list[TensorInfo]:
    """Return the entries of a checked header, in the order of the tensors' bytes."""
    start = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES], "little")
    try:
        header = parse_json(mapped[_LENGTH_BYTES:start])
    except ValueError as error:
        raise CheckpointError(f"{path}: header: {error}; fetch the file again") from None
    header.pop("__metadata__", None)
    infos = []
    for name, entry in header.items():
        (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
        infos.append(TensorInfo(name, entry["dtype"], shape, path, start + begin, end - begin))
    return sorted(infos, key=lambda info: (info.offset, info.nbytes))
