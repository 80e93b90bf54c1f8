"""Tiny random DeepSeek-V4 checkpoints in which no term is neutral, made of NumPy's seeded draws.

A case is a config.json and a seed, written under either set of names that checkpoints use. Both
sides read the same folder: fd_dsa through its own loader, transformers through `from_pretrained`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import read_config
from tests.models.drawn import in_drawn_order

WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
# around the edges of entries of 4 and 16 tokens, of blocks of 16 and of tiles of 64
LENGTHS = (1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 130)

_TINY: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 24,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": 8,
    "layer_types": [WINDOW, CSA, HCA, CSA, HCA, WINDOW],
    "compress_rates": {CSA: 4, HCA: 16},
    "num_hash_layers": 2,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 6,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    # low enough that activations reach it
    "swiglu_limit": 1.0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
# Sinkhorn far from its limit, and epsilons that show where each of them goes
_EPSILONS = {"hc_sinkhorn_iters": 2, "hc_eps": 0.05, "rms_norm_eps": 0.02}
# sizes of windows and ratios as released, and the list of ratios with one for a draft layer
_RELEASED = {
    "sliding_window": 128,
    "layer_types": None,
    "compress_rates": None,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hidden_layers": 4,
}


def _layers(*kinds: str) -> dict[str, Any]:
    """A model of these layers alone."""
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer of 94 characters; returns the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:94]
    vocab = {token: i for i, token in enumerate(("<bos>", "<eos>", *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@dataclass(frozen=True)
class Case:
    """One random model: what differs from the common configuration, and its seed."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    lengths: tuple[int, ...] = LENGTHS
    repeats_experts: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the case."""
        return {k: v for k, v in (_TINY | self.changes).items() if v is not None}

    @property
    def block_size(self) -> int:
        """Tokens of a cache block: the longer ratio."""
        return 128 if "compress_ratios" in self.config else 16

    def prompt(self, length: int) -> list[int]:
        """Token ids of a prompt of the case."""
        rng = np.random.default_rng([self.seed, length])
        return rng.integers(2, self.config["vocab_size"], length).tolist()

    def write(self, folder: Path, names: str = "saved") -> Path:
        """Write config.json and model.safetensors; returns the folder.

        The config says whether there is a layer for multi-token prediction.

        Args:
            folder: made if need be.
            names: "saved" as `save_pretrained` writes them, or "deepseek".
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        rng, config = np.random.default_rng(self.seed), read_config(folder)
        assert isinstance(config, DeepseekV4Config)
        if config.num_nextn_predict_layers:
            config = config.with_mtp_layer()
        rename = {"saved": saved_name, "deepseek": deepseek_name}[names]
        tensors = {}
        for name, expected in in_drawn_order(expected_tensors(config)).items():
            if expected.ids_below:
                tensors[rename(name)] = self._table(rng, expected)
            else:
                tensors[rename(name)] = random_weight(rng, name, expected.shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def write_served(self, folder: Path) -> Path:
        """`write`, and a tokenizer of 94 characters."""
        return write_tokenizer(self.write(folder))

    def _table(self, rng: np.random.Generator, expected: Any) -> np.ndarray:
        """Experts of each token id: different ones, or drawn with repetition."""
        rows, width = expected.shape
        if self.repeats_experts:
            return rng.integers(0, expected.ids_below, (rows, width))
        order = rng.random((rows, expected.ids_below)).argsort(axis=1)
        return np.ascontiguousarray(order[:, :width])


def saved_name(name: str) -> str:
    """A tensor's name in what `save_pretrained` writes."""
    name = {"lm_head.weight": "head.weight"}.get(name, name)
    return name.replace(".attn.kv_norm.", ".attn.norm.")


def deepseek_name(name: str) -> str:
    """A tensor's name in DeepSeek's own checkpoints."""
    others = {
        "lm_head.weight": "head.weight",
        "model.embed_tokens.weight": "embed.weight",
        "model.norm.weight": "norm.weight",
    }
    name = re.sub(r"^model\.hc_head\.hc_", "hc_head_", others.get(name, name))
    return name.removeprefix("model.")


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor that keeps activations near 1, choices spread, and no term neutral."""
    draw = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + np.float32(0.2) * draw
    if name.endswith("_scale"):
        return 1 + np.float32(0.3) * draw
    if name.endswith("gate.bias"):
        return np.float32(0.1) * draw
    if name.endswith(("_base", "sink", "ape")):
        return np.float32(0.5) * draw
    if "embed_tokens" in name:
        return np.float32(0.5) * draw
    return draw / np.float32(math.sqrt(shape[-1]))


CASES = {
    case.name: case
    for case in (
        Case("mixed", seed=1),
        Case("yarn", {"rope_scaling": _YARN}, seed=2),
        Case("epsilons", _EPSILONS, seed=3),
        Case("window-only", _layers(WINDOW, WINDOW, WINDOW), seed=4),
        Case("csa-only", _layers(CSA, CSA, CSA), seed=5),
        Case("hca-only", _layers(HCA, HCA, HCA), seed=6),
        Case("two-streams-one-group", {"hc_mult": 2, "o_groups": 1}, seed=7),
        Case("all-entries", {"index_topk": 64}, seed=8),
        Case(
            "repeated-experts",
            {"num_hash_layers": 6, "num_experts_per_tok": 3},
            seed=9,
            repeats_experts=True,
        ),
        Case("sigmoid-tied", {"scoring_func": "sigmoid", "tie_word_embeddings": True}, seed=10),
        Case("released-ratios", _RELEASED, seed=11, lengths=(127, 128, 129, 300)),
    )
}
# those whose logits are committed
GOLDEN = ("mixed", "yarn", "epsilons", "repeated-experts", "released-ratios")
# whose greedy answers are committed, to prompts of so many tokens
GREEDY, GREEDY_PROMPTS, STEPS = "mixed", (20, 35, 48, 70), 24
