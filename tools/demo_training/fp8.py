"""The demo model with weights in FP8, e4m3 with 128 x 128 scales, as DeepSeek-V3.2 has them.

    python -m tools.demo_training.fp8 DIR

It answers nearly as the demo model does, so it shows what the FP8 paths of a device change.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from fd_dsa.config import demo_model_path
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import read_config
from tools.demo_training.mtp import BLOCK, quantised

WEIGHTS = "model.safetensors"


def main(folder: Path) -> None:
    """Write the model to `folder`, without its layer for drafts."""
    source = demo_model_path()
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fields["num_nextn_predict_layers"] = 0
    del fields["mtp_quantization_config"]
    fields["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    expected = expected_tensors(read_config(folder))
    tensors = load_file(source / WEIGHTS)
    for name in [name for name in tensors if expected[name].quantisable]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
