"""A tiny random model with a tokenizer as large as DeepSeek-V3.2's, and as long a context."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from fd_dsa.config import demo_model_path
from tests.models.folders import TINY, YARN, write_folder

VOCAB_SIZE = 129_280
MAX_MODEL_LEN = 163_840
# runs that real vocabularies of this size hold as one token, the longest of 128 characters
RUNS = ("Ġ", "-", "=", "*", "/", "_", "#", ".")
LONGEST_RUN = 128


def _fill(vocab: dict[str, int], merges: list[list[str]], special: set[str]) -> None:
    """Add merges until the vocabulary is full: long runs, then pairs of known tokens."""

    def add(left: str, right: str) -> None:
        if left + right not in vocab and len(vocab) < VOCAB_SIZE:
            vocab[left + right] = len(vocab)
            merges.append([left, right])

    draw, parts = random.Random(0), sorted(vocab.keys() - special)
    for run in RUNS:
        length = 1
        while length < LONGEST_RUN:
            add(run * length, run * length)
            length *= 2
    while len(vocab) < VOCAB_SIZE:
        add(draw.choice(parts), draw.choice(parts))


def write_model(folder: Path) -> Path:
    """A model folder: random weights of a few megabytes, the demo model's tokenizer and template.

    The tokenizer has further merges, which are made up, so that tables and searches have their
    real size.
    """
    demo = demo_model_path()
    tokenizer = json.loads((demo / "tokenizer.json").read_text("utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    _fill(tokenizer["model"]["vocab"], tokenizer["model"]["merges"], special)
    fields = TINY | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rope_scaling": YARN,
        "index_topk": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    write_folder(folder, fields)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    shutil.copy(demo / "tokenizer_config.json", folder)
    return folder
