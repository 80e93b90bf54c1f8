"""Names of arguments in other libraries, with the arguments to write here."""

from __future__ import annotations

from collections.abc import Mapping

_FORM = "write structured_outputs=StructuredOutputsParams(json=SCHEMA), or regex, choice, grammar"
_NO_BEAMS = "leave it out, there is no beam search"
_GRAPHS = "write cudagraph_capture_sizes, or enforce_eager=True to capture nothing"
_FOLDER = "give model the folder that huggingface_hub.snapshot_download returns"
_ONE_MACHINE = "write tensor_parallel_size, or serve with --engine fastdeploy"
_STAYS = "leave it out, weights and caches stay on the device"
_TEXT_ONLY = "leave it out, models read only text"
_SERVER = "leave it out, it is a flag of the server"
_DRAFTS = 'write speculative_config={"method": "mtp", "num_speculative_tokens": 3}'
_PARSED = "leave it out, fd_dsa.chat.parser.OutputParser reads the text of an answer"
_READ = "leave it out, the model folder says it"

SAMPLING_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("use_beam_search", "num_beams", "beam_width", "length_penalty"), _NO_BEAMS),
    "early_stopping": _NO_BEAMS,
    **dict.fromkeys(("guided_decoding", "guided_json", "guided_regex", "guided_choice"), _FORM),
    **dict.fromkeys(("guided_grammar", "response_format", "json_schema", "json"), _FORM),
    **dict.fromkeys(("regex", "choice", "grammar", "structured_output"), _FORM),
    **dict.fromkeys(("max_new_tokens", "max_completion_tokens", "max_length"), "write max_tokens"),
    **dict.fromkeys(("max_output_tokens", "num_predict", "n_predict"), "write max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "write min_tokens"),
    **dict.fromkeys(("stop_strings", "stop_sequences"), "write stop"),
    **dict.fromkeys(("num_return_sequences", "num_completions"), "write n"),
    "allowed_token_ids": "write logit_bias to favor tokens, or structured_outputs for a form",
    "best_of": "write n, all sampled outputs are returned",
    "detokenize": "leave it out, every output has its text and its token_ids",
    "do_sample": "write temperature=0 for greedy sampling",
    "extra_args": "leave it out",
    "logits_processors": "write logit_bias, bad_words or structured_outputs",
    "output_kind": "write stream=True in generate or chat for outputs as they come",
    "repeat_penalty": "write repetition_penalty",
    "spaces_between_special_tokens": "leave it out",
    "stop_token": "write stop_token_ids",
    "top_logprobs": "write logprobs",
    "truncate_prompt_tokens": "cut the token ids of the prompt",
}
"""Arguments that SamplingParams has in other libraries, and what to write here."""

FORM_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("schema", "json_schema", "guided_json"), "write json"),
    **dict.fromkeys(("pattern", "guided_regex"), "write regex"),
    **dict.fromkeys(("choices", "guided_choice"), "write choice"),
    **dict.fromkeys(("guided_grammar", "lark", "gbnf"), "write grammar"),
    "backend": "leave it out, llguidance serves every form",
    "disable_additional_properties": 'write "additionalProperties": false in the schema',
    "disable_any_whitespace": "leave it out, white space in JSON is bounded",
    "disable_fallback": "leave it out, there is no other backend",
    "structural_tag": "write grammar",
    "whitespace_pattern": "leave it out, white space in JSON is bounded",
}
"""The same for StructuredOutputsParams."""

LLM_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("api_key", "host", "port"), _SERVER),
    **dict.fromkeys(("cpu_offload_gb", "swap_space"), _STAYS),
    **dict.fromkeys(("compilation_config", "cuda_graph_sizes", "use_cuda_graph"), _GRAPHS),
    **dict.fromkeys(
        ("max_seq_len_to_capture", "use_cudagraph", "graph_optimization_config"), _GRAPHS
    ),
    **dict.fromkeys(
        ("context_length", "max_seq_len", "max_length", "n_ctx"), "write max_model_len"
    ),
    **dict.fromkeys(("data_parallel_size", "pipeline_parallel_size"), _ONE_MACHINE),
    "enable_expert_parallel": _ONE_MACHINE,
    **dict.fromkeys(("disable_custom_all_reduce", "disable_log_stats"), "leave it out"),
    **dict.fromkeys(("distributed_executor_backend", "worker_cls"), "leave it out"),
    **dict.fromkeys(("download_dir", "revision", "tokenizer_revision", "code_revision"), _FOLDER),
    **dict.fromkeys(("draft_model", "num_speculative_tokens", "speculative_model"), _DRAFTS),
    **dict.fromkeys(
        ("enable_lora", "max_lora_rank", "max_loras"), "leave it out, no adapter is read"
    ),
    **dict.fromkeys(("limit_mm_per_prompt", "mm_processor_kwargs"), _TEXT_ONLY),
    **dict.fromkeys(("enable_auto_tool_choice", "reasoning_parser", "tool_call_parser"), _PARSED),
    **dict.fromkeys(("quantization", "tokenizer_mode", "skip_tokenizer_init", "task"), _READ),
    **dict.fromkeys(("runner", "model_impl", "config_format"), _READ),
    **dict.fromkeys(("dp", "dp_size", "ep", "ep_size", "pp", "pp_size"), _ONE_MACHINE),
    **dict.fromkeys(("tp", "tp_size", "num_gpus", "world_size"), "write tensor_parallel_size"),
    **dict.fromkeys(("precision", "torch_dtype"), "write dtype"),
    "device_map": "write device",
    "disable_cascade_attn": "leave it out",
    "guided_decoding_backend": "leave it out, llguidance serves every form",
    "hf_overrides": "edit config.json; index_topk is an argument",
    "max_logprobs": "leave it out, the bound is 20",
    "mem_fraction_static": "write gpu_memory_utilization",
    "model_path": "write model",
    "override_generation_config": "write SamplingParams",
    "scheduling_policy": "leave it out, requests run in the order of their arrival",
    "structured_outputs_config": "leave it out, llguidance serves every form",
    "trust_remote_code": "leave it out, no Python file of a folder is run",
}
"""The same for LLM."""

CALL_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("add_generation_prompt", "prefix"), "write continue_final_message"),
    **dict.fromkeys(("conversation", "conversations"), "write messages"),
    **dict.fromkeys(
        ("enable_thinking", "thinking"), 'write chat_template_kwargs={"thinking": True}'
    ),
    **dict.fromkeys(("input", "inputs", "text", "texts"), "give the first argument no name"),
    **dict.fromkeys(("lora_request", "priority", "tokenization_kwargs"), "leave it out"),
    "chat_template": "write LLM(chat_template=FILE)",
    "chat_template_content_format": "leave it out, the template shows which form it takes",
    "guided_options_request": _FORM,
    "mm_processor_kwargs": _TEXT_ONLY,
    "params": "write sampling_params",
    "prompt_token_ids": "give the token ids as prompts: one list, or a list of lists",
    "reasoning_effort": 'write chat_template_kwargs={"reasoning_effort": LEVEL}',
    "system": 'write a message {"role": "system", "content": TEXT}',
    "tool_choice": "leave tools out for no call; the server's chat completions take tool_choice",
    "use_tqdm": "leave it out, no progress is printed; stream=True gives outputs as they come",
}
"""The same for LLM.generate and LLM.chat."""
