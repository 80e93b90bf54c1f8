"""Chat requests: from the conversation to the engine's job and the answer format."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from fd_dsa.chat.control import QUOTED_CHARS, RenderedPrompt, render_prompt, texts_in
from fd_dsa.chat.enforced import constraints
from fd_dsa.chat.grammar import forced_calls_grammar
from fd_dsa.chat.json_text import NOT_UNICODE, is_unicode
from fd_dsa.chat.parser import AUTO, AnswerFormat
from fd_dsa.chat.sandbox import PromptTooLong, bounded_rendering
from fd_dsa.chat.template import ChatTemplate, opens_reasoning
from fd_dsa.chat.template_process import TemplateProcess
from fd_dsa.chat.tool_formats import ToolFormat
from fd_dsa.engine.sampling_params import for_answer
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.errors import ConfigError
from fd_dsa.serve.errors import ApiError, ContextLengthError, FieldError, request_error
from fd_dsa.serve.generation import (
    Job,
    check_answer_size,
    check_bytes,
    check_jobs,
    encode_prompt,
    max_scored_tokens,
    resolve_max_tokens,
)
from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.state import ServerState

_NO_ARGUMENTS = {"additionalProperties": False}
# keywords of a schema that describes no argument
_NO_PROPERTIES: dict[str, object] = {"type": "object", "properties": {}, "required": []}
# clients send the same template many times; few are kept, because each has a process
_compiled = functools.lru_cache(4)(
    lambda source, tokens, formats: ChatTemplate(
        source, dict(tokens), family_formats=formats, compiler=TemplateProcess
    )
)


def make_job(
    state: ServerState,
    body: ChatCompletionRequest,
    request_id: str,
    *,
    max_generated: int | None = None,
) -> tuple[Job, AnswerFormat]:
    """Render and tokenize the conversation, which is slow and belongs into a thread.

    Args:
        max_generated: number of tokens to generate, or the rest of the context if that is less; in
            place of a number in the body.

    Raises:
        ApiError: 400 if the conversation cannot be rendered, is too long, or could never run. Also
            if the model has no format for it.
    """
    tokenizer = state.engine.tokenizer
    renderer = _renderer(state, body)
    tool_format = _tool_format(state, body, renderer)
    rendered = _render(state, renderer, body)
    answer = AnswerFormat(
        has_reasoning=renderer.has_reasoning(state.options.reasoning_parser),
        in_reasoning=opens_reasoning(
            rendered.masked,
            body.messages[-1].for_template() if body.continue_final_message else None,
        ),
        tool_format=tool_format,
        schemas={tool.function.name: tool.function.parameters for tool in body.offered_tools},
        has_only_calls=body.choice.mode in ("required", "named"),
    )
    if body.include_reasoning is False and answer.in_reasoning and not answer.has_reasoning:
        raise FieldError(
            "include_reasoning: false, but the server was started with --reasoning-parser none and "
            "cannot tell the reasoning; switch it off by reasoning_effort"
        )
    prompt = _encode(state, rendered, body)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    requested: int | None = getattr(body, param)
    limit = state.options.max_answer_scores
    if max_generated is not None:
        requested = min(max_generated, state.engine.max_model_len - len(prompt))
    default = max_scored_tokens(limit, len(prompt), body)
    max_tokens = resolve_max_tokens(
        state, len(prompt), requested, default=default, param=param, source="messages"
    )
    params = body.sampling_params(max_tokens, state.engine.sampling_defaults)
    params = dataclasses.replace(
        for_answer(params, tokenizer, answer),
        constrain_reasoning=bool(body.constrain_reasoning),
        structured_outputs=_form(params.structured_outputs, body, answer),
    )
    job = Job(request_id, "messages", prompt, params, functools.partial(_each_call, body, answer))
    check_answer_size(limit, [job], body, shows_prompt_once=True)
    (job,) = check_jobs(state, [job])
    return job, answer


def encode_conversation(state: ServerState, body: ChatCompletionRequest) -> list[int]:
    """Return the token ids of the prompt that `make_job` would make.

    Raises:
        ApiError: 400 if the conversation cannot be rendered or the model has no format for it.
    """
    renderer = _renderer(state, body)
    _tool_format(state, body, renderer)
    return _encode(state, _render(state, renderer, body), body)


def _encode(state: ServerState, rendered: RenderedPrompt, body: ChatCompletionRequest) -> list[int]:
    """Return the token ids of a rendered prompt."""
    try:
        return encode_prompt(state, rendered, "messages", add_special_tokens=False)
    except FieldError:
        _check_unicode(body)
        raise


def _check_unicode(body: ChatCompletionRequest) -> None:
    """Raise ApiError 400 for a text of the prompt that is no valid Unicode."""
    parts: list[tuple[str, object]] = [
        *((f"messages[{i}]", message.for_template()) for i, message in enumerate(body.messages)),
        *((f"tools[{i}].function", tool.model_dump()) for i, tool in enumerate(body.tools or [])),
        ("chat_template_kwargs", body.chat_template_kwargs),
    ]
    for path, value in parts:
        if not all(map(is_unicode, texts_in(value))):
            raise FieldError(f"{path}: {NOT_UNICODE}")


def _renderer(state: ServerState, body: ChatCompletionRequest) -> ChatTemplate:
    """Return the template of the request, otherwise the one of the model."""
    tokenizer = state.engine.tokenizer
    if body.chat_template is not None:
        if not state.options.trust_request_chat_template:
            raise FieldError(
                "chat_template: a template can keep a processor busy for 10 seconds, so this "
                "server takes none from requests; start it with --trust-request-chat-template, or "
                "with --chat-template"
            )
        try:
            return _compiled(
                body.chat_template,
                tuple(tokenizer.special_tokens.items()),
                () if tokenizer.chat_renderer is None else tokenizer.chat_renderer.family_formats,
            )
        except ConfigError as error:
            raise FieldError(f"chat_template: {error}") from error
    if tokenizer.chat_renderer is None:
        raise FieldError(
            f"messages: {tokenizer.why_no_chat}; use /v1/completions, or start the server with "
            "--chat-template"
        )
    return tokenizer.chat_renderer


def _tool_format(
    state: ServerState, body: ChatCompletionRequest, renderer: ChatTemplate
) -> ToolFormat | None:
    """Return the format of the calls of this answer, or None if it may have no calls."""
    if not body.offered_tools:
        return None
    name = state.options.tool_call_parser
    tool_format = renderer.tool_format(name)
    if tool_format is None:
        why = "the model's chat template has no tool-call format this server knows"
        if name != AUTO:
            why = "the server was started with --tool-call-parser none"
        raise FieldError(f"tools: {why}; leave them out, or start it with --tool-call-parser")
    return tool_format


def _render(
    state: ServerState, renderer: ChatTemplate, body: ChatCompletionRequest
) -> RenderedPrompt:
    """Render the prompt with the tools that `tool_choice` allows."""
    # check the size before the template copies the messages
    messages = [message.for_template() for message in body.messages]
    texts = [{**message, "role": None} for message in messages]
    check_bytes(state, texts_in(texts, with_names=False), "messages")
    tools = [tool.model_dump(exclude_unset=True) for tool in body.offered_tools]
    check_bytes(state, texts_in(tools), "tools")
    goes_on = bool(body.continue_final_message)
    begins = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    allows = state.options.allow_special_tokens_in_text
    limit = state.options.prompt_bytes(state.engine.max_model_len)
    try:
        with bounded_rendering(limit if allows else QUOTED_CHARS * limit):
            return render_prompt(
                renderer,
                None if allows else state.engine.tokenizer.control_tokens,
                messages,
                begins,
                tools=tools,
                continue_final_message=goes_on,
                **body.template_variables,
            )
    except PromptTooLong as error:
        raise ContextLengthError(
            f"messages: {error}; allowed are at most {limit} bytes, the --max-prompt-bytes of this "
            "server; shorten the text",
            state.engine.max_model_len,
        ) from error
    except ValueError as error:
        raise request_error(error, ("chat_template_kwargs",), "messages") from error


def _form(
    requested: StructuredOutputsParams | None, body: ChatCompletionRequest, answer: AnswerFormat
) -> StructuredOutputsParams | None:
    """Return the form of the whole answer: calls, the requested form, or either.

    `response_format` describes the content. A forced call has no content, so the field is ignored
    then.
    """
    is_forced = body.choice.mode in ("required", "named")
    if not is_forced:
        if requested is None:
            return None
        calls = None if answer.tool_format is None else _calls(body, answer)
        return dataclasses.replace(requested, alternative=calls)
    if requested is not None and requested.source != "response_format":
        raise FieldError(
            f"{requested.source}: got it with a tool_choice that forces calls; must be left out; "
            "or use tool_choice auto, with which an answer is a call or has this form"
        )
    return _calls(body, answer)


def _calls(body: ChatCompletionRequest, answer: AnswerFormat) -> StructuredOutputsParams:
    """Return the form of answers that call a tool, or the one named by `tool_choice`."""
    try:
        schemas = _called(body, answer)
        return _form_of_calls(answer, schemas, several=not body.one_call, source="tools")
    except ApiError:
        _check_unicode(body)
        raise


def _called(body: ChatCompletionRequest, answer: AnswerFormat) -> Mapping[str, Any]:
    """Return the tools that may be called, each with the schema of its arguments."""
    names = answer.schemas if body.choice.name is None else [body.choice.name]
    return {name: _parameters(answer.schemas[name]) for name in names}


def _parameters(schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments.

    A schema that describes no argument allows none, as in the OpenAI API and in vLLM's grammars.
    """
    given = schema or {}
    own = {keyword: given[keyword] for keyword in constraints(given)}
    return _NO_ARGUMENTS if {**_NO_PROPERTIES, **own} == _NO_PROPERTIES else given


def _each_call(body: ChatCompletionRequest, answer: AnswerFormat) -> list[StructuredOutputsParams]:
    """Return the form of one call of each tool, with messages that name the tool."""
    return [
        _form_of_calls(answer, {name: of}, several=False, source=f"tools: a call of {name!r}")
        for name, of in _called(body, answer).items()
    ]


def _form_of_calls(
    answer: AnswerFormat, schemas: Mapping[str, object], *, several: bool, source: str
) -> StructuredOutputsParams:
    assert answer.tool_format is not None, "checked: there is a format if there are tools"
    try:
        grammar = forced_calls_grammar(answer.tool_format.name, schemas, several=several)
        return StructuredOutputsParams(grammar=grammar, source=source)
    except ValueError as error:
        raise ApiError(400, str(error), param="tools") from error
