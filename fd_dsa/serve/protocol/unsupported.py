"""Fields that other servers know and this one refuses, unless their value changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fd_dsa.serve.errors import FieldError, show

logger = logging.getLogger("fd_dsa.serve")

# field -> values which leave the result as it is; None is always one of them
_BOTH: dict[str, tuple[Any, ...]] = {
    # vLLM
    "allowed_token_ids": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "return_tokens_as_token_ids": (False,),
    "structural_tag": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # SGLang
    "ebnf": ("",),
    "lora_path": (),
    "regex": ("",),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "stop_regex": ([], ""),
    # FastDeploy
    "disable_chat_template": (False,),
    "prompt_token_ids": (),
    "reasoning_max_tokens": (),
    "temp_scaled_logprobs": (False,),
    "top_p_normalized_logprobs": (False,),
    # llama.cpp
    "grammar": ("",),
    "json_schema": (),
    # OpenAI, and the models' own services
    "audio": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "thinking": (),
    "web_search_options": (),
}

IN_COMPLETIONS = {**_BOTH, "add_special_tokens": (True,)}
IN_CHAT = {**_BOTH, "add_special_tokens": (False,), "echo": (False,)}
# what does the same here
_INSTEAD = {
    "ebnf": "structured_outputs.grammar",
    "functions": "tools",
    "function_call": "tool_choice",
    "grammar": "structured_outputs.grammar",
    "json_schema": "response_format",
    "prompt_token_ids": "prompt in /v1/completions",
    "regex": "structured_outputs.regex",
    "thinking": "reasoning_effort or chat_template_kwargs",
}


def check_extra_fields(
    fields: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ApiError 400 for a field that would change the result.

    Args:
        fields: those of a body that its model does not declare.
        unsupported: `IN_COMPLETIONS` or `IN_CHAT`.
    """
    for name, value in fields.items():
        neutral = unsupported.get(name)
        if neutral is None:
            logger.debug("unknown field %s is ignored", show(name))
            continue
        if value is None or any(_same(value, v) for v in neutral):
            continue
        allowed = " or ".join(show(v) for v in (*neutral, None))
        hint = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise FieldError(f"{name}: got {show(value)}; not supported yet, only {allowed}{hint}")


def _same(value: Any, neutral: Any) -> bool:
    """Equality in which false is not 0: `logprobs: 0` asks for something."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
