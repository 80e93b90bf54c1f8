"""One memory-mapped safetensors file: its header, checked, and the bytes of its tensors."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fd_dsa.errors import CheckpointError

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

    The library checks the header; the bytes are mapped here, since it hands out no bfloat16 and no
    FP8 as NumPy arrays, and gives no pages back.

    Args:
        path: the file; it stays mapped until `close`.

    Raises:
        CheckpointError: the file is missing, truncated, longer than its header says, or its
            header is damaged.

    Source: format description of huggingface/safetensors (README, "Format").
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # numpy is its name for no tensor library
            with safe_open(path, framework="numpy"), path.open("rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: file not found") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: truncated or no sound safetensors file ({path.stat().st_size} bytes): "
                f"{error}; fetch it again"
            ) from None
        start = _LENGTH_BYTES + int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        header = json.loads(self._map[_LENGTH_BYTES:start])
        header.pop("__metadata__", None)
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            self.tensors[name] = TensorInfo(
                name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin
            )

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
