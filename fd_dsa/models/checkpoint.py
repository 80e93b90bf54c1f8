"""A checkpoint in Hugging Face format: one safetensors file, or shards with an index."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.errors import CheckpointError
from fd_dsa.models.config_reader import read_json_object
from fd_dsa.models.dequantize import SCALE_SUFFIX, dequantize_blocks, to_float32
from fd_dsa.models.safetensors_file import SafetensorsFile, TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model folder, mapped but not read; use `Checkpoint.open`.

    Attributes:
        folder: the model folder.
    """

    def __init__(self, folder: Path, files: Sequence[SafetensorsFile]) -> None:
        self.folder = folder
        self._files = {file.path: file for file in files}
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self._infos:
                    raise CheckpointError(
                        f"{file.path}: tensor {name!r} is in {self._infos[name].file.name} too"
                    )
                self._infos[name] = info

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Map the weights of a model folder and check their headers.

        Raises:
            CheckpointError: no weights, a missing, truncated or damaged file, a tensor that is
                there twice, or an index that disagrees with its shards.

        Cost: reads the headers only.
        """
        folder = Path(folder)
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the stale one"
            )
        if not single.exists() and not index.exists():
            raise CheckpointError(
                f"{folder}: found neither {SINGLE_FILE} nor {INDEX_FILE}; "
                "weights in the safetensors format are needed"
            )
        if single.exists():
            return cls(folder, [SafetensorsFile(single)])
        weight_map = _read_weight_map(index)
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        for path in shards:
            if not path.is_file():
                raise CheckpointError(
                    f"{index}: names the shard {path.name}, which is not in the folder"
                )
        checkpoint = cls(folder, list(map(SafetensorsFile, shards)))
        checkpoint._check_index(index, weight_map)
        return checkpoint

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the mapped files."""
        for file in self._files.values():
            file.close()

    def names(self) -> list[str]:
        """Names of all tensors in file order: shard by shard, each from its first byte on."""
        order = {path: number for number, path in enumerate(self._files)}
        infos = sorted(self._infos.values(), key=lambda info: (order[info.file], info.offset))
        return [info.name for info in infos]

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies, its dtype and shape.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
        return self._infos[name]

    def raw(self, name: str) -> np.ndarray:
        """Read-only view of a tensor's bytes, uint8 [nbytes]."""
        info = self.info(name)
        return self._files[info.file].bytes_of(info)

    def read(self, name: str, weight_block_size: tuple[int, int] = (128, 128)) -> np.ndarray:
        """A tensor as float32, in its stored shape.

        Args:
            name: Hugging Face name; of a checkpoint that `validate` has passed.
            weight_block_size: rows and columns of a block of FP8 weights.

        Returns:
            float32; a read-only view of the file for F32, a new array for BF16, F16 and F8_E4M3
            (multiplied with the blocks of `<name>_scale_inv`).

        Raises:
            CheckpointError: unknown name or unsupported dtype.
        """
        info = self.info(name)
        if info.dtype != "F8_E4M3":
            return to_float32(self.raw(name), info)
        scale = self.info(name + SCALE_SUFFIX)
        scales = to_float32(self.raw(scale.name), scale)
        return dequantize_blocks(self.raw(name).reshape(info.shape), scales, weight_block_size)

    def release(self, name: str) -> None:
        """Let the system take back the mapped pages of a tensor."""
        info = self.info(name)
        self._files[info.file].release(info)

    def _check_index(self, index: Path, weight_map: dict[str, str]) -> None:
        """The index names each tensor of the shards, where it is."""
        for name, shard in weight_map.items():
            info = self._infos.get(name)
            if info is None or info.file.name != shard:
                place = "no shard" if info is None else info.file.name
                raise CheckpointError(
                    f"{index}: tensor {name!r}: expected in {shard}, found in {place}"
                )
        extra = self._infos.keys() - weight_map.keys()
        if extra:
            name = min(extra)
            raise CheckpointError(
                f"{self._infos[name].file}: tensor {name!r} is not in {index.name} "
                f"({len(extra)} such)"
            )


def _read_weight_map(index: Path) -> dict[str, str]:
    """File name of each tensor."""
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: got {weight_map!r}, allowed: an object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: weight_map.{name}: got {shard!r}, allowed: a file name in the folder"
            )
    return weight_map
