"""Fields of config.json that change no result of the main model.

Source: config.json of DeepSeek-V3.1, V3.2, V3.2-Exp, V4-Flash, GLM-5, GLM-5.1, GLM-5.2 and GLM-5.3.
Hugging Face transformers 4.44 to 5.23 add fields in `save_pretrained`.
"""

from __future__ import annotations

from typing import Any

# metadata and settings of a library
_METADATA = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "experts_implementation",
    "finetuning_task",
    "id2label",
    "index_chunk_size",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_indexer_scores",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
)
# used only in training
_TRAINING = (
    "attention_dropout",
    "aux_loss_alpha",
    "gradient_checkpointing",
    "indexer_loss_coef",
    "initializer_range",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "seq_aux",
)
# fields that repeat another one, or describe MTP layers, whose drafts the model verifies
_REPEATED = (
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "head_dim",
    "index_share_for_mtp_iteration",
)
# defaults of `generate`, which transformers 4 also wrote into config.json. Sampling parameters come
# from generation_config.json
_GENERATION = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "is_decoder",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
# lists of quantised modules, which the dtypes of the stored tensors show too
_QUANTIZATION = (
    "dequantize",
    "exclude_modules",
    "ignore",
    "ignored_layers",
    "modules_in_block_to_quantize",
    "modules_to_convert",
    "modules_to_not_convert",
    "to_quant_block_names",
    "block_name_to_quantize",
)
# what a quantiser notes of its work, and formats of caches, which a flag decides
_QUANTIZER = (
    *("amp", "autoround_version", "enable_quanted_input", "iters", "nsamples", "provider"),
    *("damp_percent", "lm_head", "meta", "method", "static_groups", "true_sequential"),
    *("global_compression_ratio", "kv_cache_quant_algo", "kv_cache_scheme", "producer", "version"),
)
_HARMLESS = frozenset(
    (
        *(*_METADATA, *_TRAINING, *_REPEATED, *_GENERATION),
        *(f"quantization_config.{name}" for name in (*_QUANTIZATION, *_QUANTIZER)),
    )
)

# field -> values with the same meaning as a missing field
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "first_k_dense_replace": (0,),
    "index_init_tokens": (0,),
    "index_k_norm_type": ("layer",),
    "index_kpool": (0, 1),
    "index_local_tokens": (0,),
    "index_topk_freq": (1,),
    "indexer_dense_warmup": (False,),
    "is_encoder_decoder": (False,),
    "mla_nope": (False,),
    "mla_use_nope": (False,),
    "moe_router_dtype": ("float32", "fp32"),
    "n_group": (1,),
    "pruned_heads": ({},),
    "swiglu_limit": (0,),
    "tie_encoder_decoder": (False,),
    "topk_group": (1,),
}

NULL_IS_ABSENT = frozenset(
    (
        "attention_bias",
        "index_skip_topk_offset",
        "index_topk_freq",
        "mlp_bias",
        "num_key_value_heads",
        "num_nextn_predict_layers",
        "qk_head_dim",
        "rope_type",
        "tie_word_embeddings",
        "type",
    )
)
"""Fields whose value null has the same meaning as a missing field."""


def is_harmless(path: str, value: object) -> bool:
    """Return True if every result stays the same when a field is ignored.

    Args:
        path: dotted path of the field, such as `quantization_config.dequantize`.
    """
    if value is None or path in _HARMLESS:
        return True
    return any(same_value(value, neutral) for neutral in _NEUTRAL.get(path, ()))


def same_value(value: object, other: object) -> bool:
    """Return True if two JSON values are equal.

    1 equals 1.0. true equals neither of these numbers.
    """
    numbers = int, float
    comparable = type(value) is type(other) or (type(value) in numbers and type(other) in numbers)
    return comparable and value == other
