"""One memory-mapped safetensors file: its header, checked, and the bytes of its tensors."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.errors import CheckpointError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: Hugging Face name.
        dtype: name in the safetensors format, for example "BF16".
        shape: as stored.
        file: the file that holds it.
        offset: of its first byte from the start of the file.
        nbytes: its length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file whose header agrees with its length.

    Args:
        path: the file; it stays mapped until `close`.

    Raises:
        CheckpointError: the file is missing, truncated, longer than its header says, or its
            header is damaged.

    Source: format description of huggingface/safetensors (README, "Format").
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = _map_file(path)
        self._size = len(self._map)
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        if length > _MAX_HEADER_BYTES:
            raise self._damaged(f"its header claims {length} bytes")
        data_start = _LENGTH_BYTES + length
        if data_start > self._size:
            raise self._truncated(data_start)
        header = self._parse(self._map[_LENGTH_BYTES:data_start])
        self.tensors = {
            name: self._tensor(name, entry, data_start)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        self._check_layout(data_start)

    def bytes_of(self, info: TensorInfo) -> np.ndarray:
        """Read-only view of a tensor's bytes, uint8 [nbytes]; no copy is made."""
        if self._map is None:
            raise RuntimeError(f"{self.path}: the file is closed")
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def release(self, info: TensorInfo) -> None:
        """Let the system take back the pages of a tensor; a later read maps them again."""
        if self._map is None or info.nbytes == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = info.offset - info.offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Give up the mapping; views that still live keep it alive themselves."""
        self._map = None

    def _damaged(self, why: str) -> CheckpointError:
        """The error of a file that is no sound safetensors file."""
        return CheckpointError(f"{self.path}: not a sound safetensors file: {why}; fetch it again")

    def _truncated(self, expected: int) -> CheckpointError:
        """The error of a file that ends too early."""
        return CheckpointError(
            f"{self.path}: truncated: expected {expected} bytes, found {self._size}; fetch it again"
        )

    def _parse(self, raw: bytes) -> dict[str, Any]:
        """The header as a dictionary."""
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return header

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object, none of whose names comes twice."""
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                raise CheckpointError(f"{self.path}: tensor {name!r} is there twice")
            entries[name] = value
        return entries

    def _tensor(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        """One entry of the header, checked by itself."""
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise self._damaged(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise self._damaged(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r} has shape {shape!r}, data_offsets {offsets!r}")
        nbytes = ITEM_BYTES[dtype] * math.prod(shape)
        if offsets[1] - offsets[0] != nbytes:
            raise self._damaged(
                f"tensor {name!r}: {dtype} {shape} takes {nbytes} bytes, data_offsets {offsets} "
                f"give {offsets[1] - offsets[0]}"
            )
        return TensorInfo(name, dtype, tuple(shape), self.path, data_start + offsets[0], nbytes)

    def _check_layout(self, data_start: int) -> None:
        """The tensors fill the file from the header to its end, without gap or overlap."""
        end = data_start
        for info in sorted(self.tensors.values(), key=lambda one: (one.offset, one.nbytes)):
            if info.offset != end:
                raise self._damaged(
                    f"tensor {info.name!r} begins at byte {info.offset}, expected {end}"
                )
            end += info.nbytes
        if end > self._size:
            raise self._truncated(end)
        if end < self._size:
            raise self._damaged(f"{self._size - end} bytes follow its last tensor")


def _map_file(path: Path) -> mmap.mmap:
    """The file mapped for reading."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes hold no safetensors header; fetch it again"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _is_counts(value: Any) -> bool:
    """Whether a JSON value is a list of integers of at least 0."""
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    )
