"""A checkpoint of the first layers of another: `python -m tools.fastdeploy_check.cut`.

Step times of a whole model need a whole machine. A cut of five layers, as in FastDeploy #7367,
needs one GPU and has the same steps, only shorter. Its text has no meaning.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fd_dsa.errors import FdDsaError
from fd_dsa.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# one entry a layer, where a config has them
_PER_LAYER = ("mlp_layer_types", "indexer_types", "layer_types")


def cut(folder: Path, out: Path, num_layers: int) -> int:
    """Write the first layers of a model to a new folder. Returns the bytes of their weights.

    Tensors keep their bytes, in one file; the layer for multi-token prediction, which
    comes after the last one, is left out.

    Args:
        folder: a checkpoint in Hugging Face format.
        out: must not exist yet.
        num_layers: layers to keep, at least 1.

    Raises:
        FdDsaError: the checkpoint is damaged.
        FileExistsError: `out` is there.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with Checkpoint.open(folder) as checkpoint:
        kept = [checkpoint.info(name) for name in checkpoint.names() if _keeps(name, num_layers)]
        out.mkdir(parents=True)
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX_FILE:
                shutil.copyfile(file, out / file.name)
        (out / "config.json").write_text(json.dumps(_cut_config(config, num_layers), indent=2))
        _write(out / SINGLE_FILE, checkpoint, kept)
    return sum(info.nbytes for info in kept)


def _keeps(name: str, num_layers: int) -> bool:
    """Return True if a tensor is kept."""
    layer = _LAYER.match(name)
    return layer is None or int(layer[1]) < num_layers


def _cut_config(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the configuration of the first layers."""
    lists = {name: config[name][:num_layers] for name in _PER_LAYER if config.get(name)}
    cut = {**config, **lists, "num_hidden_layers": num_layers}
    if "num_nextn_predict_layers" in cut:
        cut["num_nextn_predict_layers"] = 0
    return cut


def _write(target: Path, checkpoint: Checkpoint, infos: Sequence[TensorInfo]) -> None:
    """Write a safetensors file with some tensors of a checkpoint."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(header).encode()
    # tensors begin at a multiple of eight bytes
    text += b" " * (-len(text) % 8)
    with target.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for info in infos:
            writer.write(checkpoint.raw(info.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Cut a checkpoint. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.fastdeploy_check.cut")
    parser.add_argument("folder", type=Path, help="checkpoint in Hugging Face format")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--layers", type=int, default=5, help="layers to keep (default: 5)")
    options = parser.parse_args(argv)
    try:
        total = cut(options.folder, options.out, options.layers)
    except (FdDsaError, OSError) as error:
        print(f"cut: {error}", file=sys.stderr)
        return 1
    print(f"{options.layers} layers, {total / (1 << 30):.2f} GiB in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
