"""Sizes of the demo model and its special tokens.

Matrix sizes are multiples of 64. kv_lora_rank, the rope part and the indexer head have the sizes
of the large models, so that every cache layout runs on this one. The model has 19,625,088
parameters, 39.3 MB in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

from .tables import load

configs = load("config")
MODEL = configs.model
FIXED_FIELDS = configs.fixed  # of config.json, which the trainer does not vary
TINY = MODEL | configs.tiny  # a few seconds on a CPU: for the tests of the trainer
# a dry run of every stage on a CPU
DRY = TINY | {"vocab_size": 4096, "max_position_embeddings": 1024, "index_topk": 64}
CONFIGS = {"demo": MODEL, "dry": DRY}

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = range(6)
ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
CHAT_TEMPLATE = (Path(__file__).resolve().parent / "chat_template.jinja").read_text(
    encoding="utf-8"
)
