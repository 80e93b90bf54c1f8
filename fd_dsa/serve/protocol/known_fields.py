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
        code: machine-readable code by which clients adapt.
    """

    neutral: tuple[Any, ...] = ()
    instead: str = ""
    reason: str = ""
    code: str | None = None


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

REFUSED: Mapping[str, Refused] = {
    # fields without an equivalent, by the values with which they have no effect
    **dict.fromkeys(
        (
            *("allowed_token_ids", "audio", "bootstrap_host", "bootstrap_port", "bootstrap_room"),
            *("chat_format", "completion_token_ids", "custom_logit_processor"),
            *("guided_whitespace_pattern", "logprob_token_ids", "lora_path", "max_dynamic_patch"),
            *("min_dynamic_patch", "moderation", "prompt_embeds", "reasoning_max_tokens"),
            *("repetition_detection", "sampler_order", "samplers", "structural_tag", "task"),
            *("thinking_budget", "truncate", "truncate_prompt_tokens", "web_search_options"),
        ),
        Refused(),
    ),
    **dict.fromkeys(
        (
            *("collect_metrics", "early_stopping", "enable_search", "grammar_lazy"),
            *("include_draft_logprobs", "penalize_nl", "post_sampling_probs"),
            *("reasoning_in_content", "return_cached_tokens_details", "return_hidden_states"),
            *("return_meta_info", "return_progress", "return_routed_experts"),
            *("return_token_offsets", "return_tokens_as_token_ids", "safe_prompt"),
            *("temp_scaled_logprobs", "thinking_forced_open", "timings_per_token"),
            *("top_p_normalized_logprobs", "use_audio_in_video", "use_beam_search", "verbose"),
            *("watermark", "watermarking"),
        ),
        Refused((False,)),
    ),
    **dict.fromkeys(
        (
            *("dry_multiplier", "dynatemp_range", "epsilon_cutoff", "eta_cutoff", "min_keep"),
            *("mirostat", "n_discard", "n_indent", "no_repeat_ngram_size", "penalty_alpha"),
            *("priority", "smoothing_factor", "top_a", "xtc_probability"),
        ),
        Refused((0,)),
    ),
    **dict.fromkeys(
        (
            *("custom_params", "disaggregate_info", "ec_transfer_params", "images_config"),
            *("kv_transfer_params", "logits_processors_args", "media_io_kwargs"),
            *("mm_processor_kwargs", "session_params", "vllm_xargs"),
        ),
        Refused(({},)),
    ),
    **dict.fromkeys(
        (
            *("context", "documents", "grammar_triggers", "image_data", "images"),
            *("logits_processors", "lora", "mm_hashes", "response_fields"),
        ),
        Refused(([],)),
    ),
    **dict.fromkeys(
        (
            *("encoder_repetition_penalty", "guidance_scale", "length_penalty", "num_beams"),
            *("tfs_z", "typ_p", "typical", "typical_p"),
        ),
        Refused((1,)),
    ),
    **dict.fromkeys(
        (
            *("adaptive_target", "reasoning_budget", "reasoning_budget_tokens", "repeat_last_n"),
            *("thinking_budget_tokens", "thinking_token_budget"),
        ),
        Refused((-1,)),
    ),
    **dict.fromkeys(
        ("grammar_type", "input_prefix", "input_suffix", "negative_prompt", "suffix"),
        Refused(("",)),
    ),
    **dict.fromkeys(
        (
            *("include_logprobs_decode_token", "parse_tool_calls", "separate_reasoning"),
            *("spaces_between_special_tokens", "stream_reasoning"),
        ),
        Refused((True,)),
    ),
    **dict.fromkeys(("t_max_predict_ms", "top_n_sigma"), Refused((-1, 0))),
    **dict.fromkeys(("n_keep", "num_keep"), Refused((0, -1))),
    "stop_regex": Refused(([], "")),
    "verbosity": Refused(("medium",)),
    "modalities": Refused((["text"],)),
    "reasoning_format": Refused(("auto", "deepseek")),
    # fields whose purpose a field of this server has
    "return_prompt_text": Refused((False,), "/tokenize"),
    **dict.fromkeys(("disable_chat_template", "raw"), Refused((False,), "/v1/completions")),
    "template": Refused(("",), "chat_template"),
    "clear_thinking": Refused(instead="chat_template_kwargs"),
    "return_full_text": Refused((False,), "echo in /v1/completions"),
    "extra_headers": Refused(({},), "headers of HTTP"),
    "no_stop_trim": Refused((False,), "include_stop_str_in_output"),
    "n_probs": Refused((0,), "logprobs"),
    **dict.fromkeys(
        (
            *("max_length", "max_new_tokens", "max_output_tokens", "n_predict", "num_predict"),
            "response_max_tokens",
        ),
        Refused(instead="max_tokens"),
    ),
    **dict.fromkeys(("instructions", "previous_response_id"), Refused(instead="messages")),
    "system": Refused(("",), "messages"),
    **dict.fromkeys(("input", "inputs"), Refused(instead="messages, or prompt in /v1/completions")),
    **dict.fromkeys(("min_length", "min_new_tokens"), Refused((0,), "min_tokens")),
    "models": Refused(([],), "model"),
    **dict.fromkeys(("n_cmpl", "num_return_sequences"), Refused((1,), "n")),
    **dict.fromkeys(
        ("input_ids", "prompt_token_ids"),
        Refused(instead="prompt in /v1/completions"),
    ),
    "reasoning": Refused(({},), "reasoning_effort"),
    "think": Refused(instead="reasoning_effort or chat_template_kwargs"),
    "repeat_penalty": Refused((1,), "repetition_penalty"),
    "format": Refused(("",), "response_format"),
    "json_schema": Refused(instead="response_format"),
    **dict.fromkeys(
        ("return_prompt_token_ids", "return_tokens"),
        Refused((False,), "return_token_ids"),
    ),
    "random_seed": Refused(instead="seed"),
    **dict.fromkeys(("stop_sequence", "stop_sequences"), Refused(([],), "stop")),
    "eos_token_id": Refused(instead="stop_token_ids"),
    **dict.fromkeys(("ebnf", "grammar"), Refused(("",), "structured_outputs.grammar")),
    "regex": Refused(("",), "structured_outputs.regex"),
    "do_sample": Refused((True,), "temperature"),
    "temp": Refused(instead="temperature"),
    **dict.fromkeys(
        ("extra_body", "extra_query", "parameters", "sampling_params"),
        Refused(({},), "the fields in it, at the top level"),
    ),
    "options": Refused(({},), "the fields in it, at the top level, num_predict as max_tokens"),
    "num_ctx": Refused(instead="the flag --max-model-len"),
    "function_call": Refused(("none", "auto"), "tool_choice"),
    "functions": Refused(([],), "tools"),
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
    "json_object": ("schema", "value"),
    "json_schema": ("json_schema", "schema"),
}
"""Type of `response_format` -> its other fields."""

JSON_SCHEMA_FIELDS = ("schema", "name", "description", "strict")
"""Fields of `json_schema`.

Every schema is strict, and the model sees no name or description.
"""
