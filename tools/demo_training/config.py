"""Sizes of the demo model and its special tokens.

Matrix sizes are multiples of 64; kv_lora_rank, the rope part and the indexer head have the sizes
of the large models, so that every cache layout runs on this one. 19,625,088 parameters, 39.3 MB
in bfloat16.
"""

from __future__ import annotations

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# fields of config.json that the trainer does not vary
FIXED_FIELDS = {
    "rope_scaling": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
# a few seconds on a CPU: for the tests of the trainer
TINY = MODEL | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 16,
    "max_position_embeddings": 128,
}
# a dry run of every stage on a CPU
DRY = TINY | {"vocab_size": 4096, "max_position_embeddings": 1024, "index_topk": 64}
CONFIGS = {"demo": MODEL, "dry": DRY}

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = range(6)
ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<|system|>{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
