"""Tensors of a model folder (`model_executor/load_weight_utils.py`): safetensors, as float32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8}


def read_checkpoint(folder: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, file by file."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        content = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            values = content[start + first : start + last].view(_NUMPY[entry["dtype"]])
            values = values.reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, np.asarray(values, np.float32)
