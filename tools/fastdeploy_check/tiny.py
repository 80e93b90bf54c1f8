"""A random model for a FastDeploy without one: DeepSeek-V3.2's attention, three small layers.

Its text has no meaning. Configuration and tokenizer are those of the demo model, with the widths
that DSA's caches and FastDeploy's own DSA kernels need. All layers are dense, because experts are
FastDeploy's in either path.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fd_dsa.config import demo_model_path
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import config_from_dict
from fd_dsa.models.sources import LM_HEAD, RandomTensor
from tests.models.folders import YARN, bf16, write_folder

FLAGS = ("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--max-num-seqs", "32")
"""Of the server, where the user gives no others: all prompts of the checks fit, in one piece."""

_LAYERS = 3
_FIELDS = {
    "hidden_size": 512,
    "num_hidden_layers": _LAYERS,
    "first_k_dense_replace": _LAYERS,
    # FlashMLA takes multiples of 64
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "max_position_embeddings": 8192,
    "rope_scaling": YARN,
}
# the best token leads by more than bfloat16 rounds, so that parity can fail
_SHARPNESS = 4


def write_tiny_model(folder: Path) -> Path:
    """Write the model to a new folder, about 120 MB in bfloat16 with fixed bytes."""
    demo = demo_model_path()
    fields = json.loads((demo / "config.json").read_text("utf-8")) | _FIELDS
    expected = expected_tensors(config_from_dict(fields))
    tensors = {name: RandomTensor(name, one.shape, 0).float32() for name, one in expected.items()}
    tensors[LM_HEAD] *= _SHARPNESS
    write_folder(folder, fields, {name: bf16(values) for name, values in tensors.items()})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, folder / name)
    return folder
