"""Fields of other servers that clients send, ignored or refused by this server.

The models of the requests have the supported fields. A field of this module is ignored if no value
of it can change an answer. Otherwise it is refused unless its value is neutral. docs/api.md lists
the ignored fields. Other unknown fields are reported in the header `X-Ignored-Fields`.

Sources: the request models of vLLM, SGLang, FastDeploy, llama.cpp and Ollama, the `openai` package,
and the hosted APIs of DeepSeek, Z.ai, Mistral and OpenRouter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Refused(NamedTuple):
    """A field that is refused.

    Attributes:
        neutral: accepted values without effect, in addition to null.
        instead: supported field for the same purpose.
        reason: reason of the refusal and advice, if the default message is not enough.
    """

    neutral: tuple[Any, ...] = ()
    instead: str = ""
    reason: str = ""


IGNORED_BECAUSE: Mapping[str, tuple[str, ...]] = {
    "names the caller, the session or the request": (
        *("user", "user_id", "metadata", "store", "safety_identifier", "request_id", "rid"),
        *("session_id", "custom_labels", "trace_context"),
    ),
    "is about price, routing or caches": (
        *("service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("provider", "cache_prompt", "id_slot", "n_cache_reuse", "extra_key", "keep_alive"),
        *("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank"),
    ),
    "only changes how fast an answer comes": (
        *("prediction", "guided_decoding_backend", "backend_sampling", "ngram_corpus_id"),
        *("speculative.n_max", "speculative.n_min", "speculative.p_min"),
    ),
    "only changes how a stream is cut": (
        *("stream_interval", "max_streaming_response_tokens", "sse_ping_interval", "tool_stream"),
    ),
    "belongs to a field that must be off": (
        *("mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        *("dry_sequence_breakers", "xtc_threshold", "dynatemp_exponent", "adaptive_decay"),
        *("smoothing_curve", "truncation_side", "routed_experts_start_len"),
        *("routed_experts_prompt_start", "return_mm_kwargs"),
    ),
}
"""Reason that no value of a field changes an answer -> names of such fields."""

IGNORED = frozenset(name for names in IGNORED_BECAUSE.values() for name in names)

_OUTPUT_LENGTH = {
    "max_new_tokens": Refused(instead="max_tokens"),
    "max_length": Refused(instead="max_tokens"),
    "max_output_tokens": Refused(instead="max_tokens"),
    "n_predict": Refused(instead="max_tokens"),
    "num_predict": Refused(instead="max_tokens"),
    "response_max_tokens": Refused(instead="max_tokens"),
    "min_length": Refused((0,), "min_tokens"),
    "min_new_tokens": Refused((0,), "min_tokens"),
    "t_max_predict_ms": Refused((-1, 0)),
    "n_indent": Refused((0,)),
    "repetition_detection": Refused(),
}
_SAMPLING = {
    "adaptive_target": Refused((-1,)),
    "allowed_token_ids": Refused(),
    "custom_logit_processor": Refused(),
    "custom_params": Refused(({},)),
    "do_sample": Refused((True,), "temperature"),
    "dry_multiplier": Refused((0,)),
    "dynatemp_range": Refused((0,)),
    "early_stopping": Refused((False,)),
    "encoder_repetition_penalty": Refused((1,)),
    "eos_token_id": Refused(instead="stop_token_ids"),
    "epsilon_cutoff": Refused((0,)),
    "eta_cutoff": Refused((0,)),
    "guidance_scale": Refused((1,)),
    "length_penalty": Refused((1,)),
    "logits_processors": Refused(([],)),
    "logits_processors_args": Refused(({},)),
    "min_keep": Refused((0,)),
    "mirostat": Refused((0,)),
    "n_cmpl": Refused((1,), "n"),
    "negative_prompt": Refused(("",)),
    "no_repeat_ngram_size": Refused((0,)),
    "no_stop_trim": Refused((False,), "include_stop_str_in_output"),
    "num_beams": Refused((1,)),
    "num_return_sequences": Refused((1,), "n"),
    "penalize_nl": Refused((False,)),
    "penalty_alpha": Refused((0,)),
    "random_seed": Refused(instead="seed"),
    "repeat_last_n": Refused((-1,)),
    "repeat_penalty": Refused((1,), "repetition_penalty"),
    "sampler_order": Refused(),
    "samplers": Refused(),
    "smoothing_factor": Refused((0,)),
    "spaces_between_special_tokens": Refused((True,)),
    "stop_regex": Refused(([], "")),
    "stop_sequence": Refused(([],), "stop"),
    "stop_sequences": Refused(([],), "stop"),
    "temp": Refused(instead="temperature"),
    "tfs_z": Refused((1,)),
    "top_a": Refused((0,)),
    "top_n_sigma": Refused((-1, 0)),
    "typ_p": Refused((1,)),
    "typical": Refused((1,)),
    "typical_p": Refused((1,)),
    "use_beam_search": Refused((False,)),
    "vllm_xargs": Refused(({},)),
    "watermark": Refused((False,)),
    "watermarking": Refused((False,)),
    "xtc_probability": Refused((0,)),
}
_FORM_OF_THE_ANSWER = {
    "ebnf": Refused(("",), "structured_outputs.grammar"),
    "format": Refused(("",), "response_format"),
    "grammar": Refused(("",), "structured_outputs.grammar"),
    "grammar_lazy": Refused((False,)),
    "grammar_triggers": Refused(([],)),
    "grammar_type": Refused(("",)),
    "guided_whitespace_pattern": Refused(),
    "json_schema": Refused(instead="response_format"),
    "regex": Refused(("",), "structured_outputs.regex"),
    "structural_tag": Refused(),
    "verbosity": Refused(("medium",)),
}
_CONTENT_OF_THE_ANSWER = {
    "audio": Refused(),
    "collect_metrics": Refused((False,)),
    "include_draft_logprobs": Refused((False,)),
    "include_logprobs_decode_token": Refused((True,)),
    "logprob_token_ids": Refused(),
    "modalities": Refused((["text"],)),
    "moderation": Refused(),
    "n_probs": Refused((0,), "logprobs"),
    "parse_tool_calls": Refused((True,)),
    "post_sampling_probs": Refused((False,)),
    "response_fields": Refused(([],)),
    "return_cached_tokens_details": Refused((False,)),
    "return_full_text": Refused((False,), "echo in /v1/completions"),
    "return_hidden_states": Refused((False,)),
    "return_meta_info": Refused((False,)),
    "return_progress": Refused((False,)),
    "return_prompt_text": Refused((False,), "/tokenize"),
    "return_prompt_token_ids": Refused((False,), "return_token_ids"),
    "return_routed_experts": Refused((False,)),
    "return_token_offsets": Refused((False,)),
    "return_tokens": Refused((False,), "return_token_ids"),
    "return_tokens_as_token_ids": Refused((False,)),
    "temp_scaled_logprobs": Refused((False,)),
    "timings_per_token": Refused((False,)),
    "top_p_normalized_logprobs": Refused((False,)),
    "verbose": Refused((False,)),
}
_REASONING = {
    "clear_thinking": Refused(instead="chat_template_kwargs"),
    "reasoning": Refused(({},), "reasoning_effort"),
    "reasoning_budget": Refused((-1,)),
    "reasoning_budget_tokens": Refused((-1,)),
    "reasoning_format": Refused(("auto", "deepseek")),
    "reasoning_in_content": Refused((False,)),
    "reasoning_max_tokens": Refused(),
    "separate_reasoning": Refused((True,)),
    "stream_reasoning": Refused((True,)),
    "think": Refused(instead="reasoning_effort or chat_template_kwargs"),
    "thinking_budget": Refused(),
    "thinking_budget_tokens": Refused((-1,)),
    "thinking_forced_open": Refused((False,)),
    "thinking_token_budget": Refused((-1,)),
}
_INPUT = {
    "chat_format": Refused(),
    "completion_token_ids": Refused(),
    "context": Refused(([],)),
    "disable_chat_template": Refused((False,), "/v1/completions"),
    "documents": Refused(([],)),
    "enable_search": Refused((False,)),
    "image_data": Refused(([],)),
    "images": Refused(([],)),
    "images_config": Refused(({},)),
    "input": Refused(instead="messages, or prompt in /v1/completions"),
    "input_ids": Refused(instead="prompt in /v1/completions"),
    "input_prefix": Refused(("",)),
    "input_suffix": Refused(("",)),
    "inputs": Refused(instead="messages, or prompt in /v1/completions"),
    "instructions": Refused(instead="messages"),
    "max_dynamic_patch": Refused(),
    "media_io_kwargs": Refused(({},)),
    "min_dynamic_patch": Refused(),
    "mm_hashes": Refused(([],)),
    "mm_processor_kwargs": Refused(({},)),
    "n_discard": Refused((0,)),
    "n_keep": Refused((0, -1)),
    "num_ctx": Refused(instead="the flag --max-model-len"),
    "num_keep": Refused((0, -1)),
    "previous_response_id": Refused(instead="messages"),
    "prompt_embeds": Refused(),
    "prompt_token_ids": Refused(instead="prompt in /v1/completions"),
    "raw": Refused((False,), "/v1/completions"),
    "safe_prompt": Refused((False,)),
    "suffix": Refused(("",)),
    "system": Refused(("",), "messages"),
    "task": Refused(),
    "template": Refused(("",), "chat_template"),
    "truncate": Refused(),
    "truncate_prompt_tokens": Refused(),
    "use_audio_in_video": Refused((False,)),
    "web_search_options": Refused(),
}
_TOOLS = {
    "function_call": Refused(("none", "auto"), "tool_choice"),
    "functions": Refused(([],), "tools"),
}
# objects whose fields belong to the top level of the body
_WRAPPERS = {
    "extra_body": Refused(({},), "the fields in it, at the top level"),
    "extra_headers": Refused(({},), "headers of HTTP"),
    "extra_query": Refused(({},), "the fields in it, at the top level"),
    "options": Refused(({},), "the fields in it, at the top level, num_predict as max_tokens"),
    "parameters": Refused(({},), "the fields in it, at the top level"),
    "sampling_params": Refused(({},), "the fields in it, at the top level"),
}
_DEPLOYMENT = {
    "bootstrap_host": Refused(),
    "bootstrap_port": Refused(),
    "bootstrap_room": Refused(),
    "disaggregate_info": Refused(({},)),
    "ec_transfer_params": Refused(({},)),
    "kv_transfer_params": Refused(({},)),
    "lora": Refused(([],)),
    "lora_path": Refused(),
    "models": Refused(([],), "model"),
    "priority": Refused((0,)),
    "session_params": Refused(({},)),
}
REFUSED: Mapping[str, Refused] = {
    **_OUTPUT_LENGTH,
    **_SAMPLING,
    **_FORM_OF_THE_ANSWER,
    **_CONTENT_OF_THE_ANSWER,
    **_REASONING,
    **_INPUT,
    **_TOOLS,
    **_WRAPPERS,
    **_DEPLOYMENT,
}
"""Fields that both endpoints refuse."""

REFUSED_IN_CHAT: Mapping[str, Refused] = {
    **REFUSED,
    "add_special_tokens": Refused((False,)),
    "echo": Refused((False,)),
    "prompt": Refused(instead="messages, or /v1/completions"),
}
_IN_CHAT = "/v1/chat/completions"
REFUSED_IN_COMPLETIONS: Mapping[str, Refused] = {
    **REFUSED,
    "add_special_tokens": Refused((True,)),
    "add_generation_prompt": Refused((True, False), _IN_CHAT),
    "chat_template": Refused(instead=_IN_CHAT),
    "chat_template_kwargs": Refused(({},), _IN_CHAT),
    "constrain_reasoning": Refused((True, False), _IN_CHAT),
    "continue_final_message": Refused((False,), _IN_CHAT),
    "enable_thinking": Refused(instead=_IN_CHAT),
    "include_reasoning": Refused((True,), _IN_CHAT),
    "max_completion_tokens": Refused(instead="max_tokens"),
    "messages": Refused(([],), f"prompt, or {_IN_CHAT}"),
    "parallel_tool_calls": Refused((True, False), _IN_CHAT),
    "reasoning_effort": Refused(instead=_IN_CHAT),
    "thinking": Refused(instead=_IN_CHAT),
    "tool_choice": Refused(("none", "auto"), _IN_CHAT),
    "tools": Refused(([],), _IN_CHAT),
    "top_logprobs": Refused((0,), "logprobs"),
}

REFUSED_IN_MESSAGES: Mapping[str, Refused] = {
    "audio": Refused(),
    "function_call": Refused(instead="tool_calls"),
    "images": Refused(([],)),
    "partial": Refused((False,), "continue_final_message of the request"),
    "prefix": Refused((False,), "continue_final_message of the request"),
}
"""Refused fields of a message. Other fields of a message reach the chat template."""

IGNORED_STREAM_OPTIONS = frozenset(("include_obfuscation",))
"""Fields of `stream_options` without effect: the server never pads texts."""

IGNORED_STRUCTURED_OUTPUTS = frozenset(("disable_fallback", "_backend", "backend"))
"""Fields of `structured_outputs` that select a library. This server has one library."""

RESPONSE_FORMAT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
}
"""Type of `response_format` -> its other fields."""

JSON_SCHEMA_FIELDS = ("schema", "name", "description", "strict")
"""Fields of `json_schema`.

Every schema is strict, and the model sees no name or description.
"""
