"""Loading keeps anonymous memory within 1.15 times the weights as held, and no file pages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict
from fd_dsa.startup.memory import weight_bytes
from tests.models.folders import TINY, Stored, bf16, f8, write_folder

LIMIT = 1.15
FIELDS = TINY | {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 8,
    "quantization_config": {"quant_method": "fp8"},
}
V4_FIELDS = {
    "model_type": "deepseek_v4",
    "compress_ratios": [0, 4],
    "num_hidden_layers": 2,
    "vocab_size": 8000,
    "hidden_size": 1024,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 12,
    "q_lora_rank": 256,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 128,
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8"},
}

# loads a folder into the Paddle model of its configuration, and prints what that took
PROBE = """
import json, sys
import paddle
from fd_dsa.models.loader import load_weights, validate
from fd_dsa.models.registry import create_model, open_checkpoint, read_config
from fd_dsa.models.weights import HostWeights

def resident_bytes(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

def anonymous_bytes():
    return resident_bytes("RssAnon")

config = read_config(sys.argv[1])
before = anonymous_bytes()
weights = HostWeights()
model = create_model(config, weights)
file_before = resident_bytes("RssFile")
peak = 0

def watched(loader):
    def take(values):
        global peak
        loader(values)
        peak = max(peak, anonymous_bytes() - before)
    return take

loaders = {name: watched(loader) for name, loader in weights.loaders.items()}
with open_checkpoint(config, sys.argv[1]) as checkpoint:
    validate(checkpoint, config)
    load_weights(checkpoint, config, loaders)
    file = resident_bytes("RssFile") - file_before
print(json.dumps({"after": anonymous_bytes() - before, "peak": peak, "file": file}))
"""


def _random_folder(folder: Path, kind: str) -> tuple[Path, int]:
    """A folder of random weights, and the bytes that they take as float32."""
    rng = np.random.default_rng(0)
    fields = V4_FIELDS if kind == "fp4" else FIELDS
    config = config_from_dict(fields)
    stored = {}
    for name, tensor in expected_tensors(config).items():
        if tensor.ids_below:
            ids = rng.integers(0, tensor.ids_below, tensor.shape)
            stored[name] = Stored("I64", tensor.shape, ids.tobytes())
        elif tensor.may_be_fp4:
            rows, columns = tensor.shape
            codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
            stored[name] = Stored("I8", codes.shape, codes.tobytes())
            scales = np.full((rows, columns // 32), 120, np.uint8)
            stored[name + "_scale_inv"] = Stored("F8_E8M0", scales.shape, scales.tobytes())
        elif kind != "bf16" and tensor.quantisable:
            stored[name] = f8(rng.integers(0, 120, tensor.shape, np.uint8))
            scale_shape = tuple(-(-extent // 128) for extent in tensor.shape)
            stored[name + "_scale_inv"] = bf16(np.ones(scale_shape, np.float32))
        else:
            stored[name] = bf16(rng.random(tensor.shape, np.float32))
    return write_folder(folder, fields, stored), weight_bytes(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp4"])
def test_anonymous_memory_while_and_after_loading(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("paddle", exc_type=ImportError)
    folder, held = _random_folder(tmp_path / "model", kind)
    assert held > 300e6
    done = subprocess.run(
        [sys.executable, "-c", PROBE, folder], check=True, capture_output=True, text=True
    )
    taken = json.loads(done.stdout)
    ratios = {name: round(number / held, 3) for name, number in taken.items()}
    print(f"{kind}: {held / 1e6:.0f} MB held, resident over held: {ratios}")
    assert 0.95 < ratios["after"] <= LIMIT
    assert ratios["peak"] <= LIMIT
    # the files are a half to an eighth of the weights; read pages were given back
    assert ratios["file"] < 0.1
