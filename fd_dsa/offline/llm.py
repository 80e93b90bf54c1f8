"""Engine without a server, which runs in the thread of the caller."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from fd_dsa.chat.parser import AnswerFormat
from fd_dsa.chat.template import opens_reasoning
from fd_dsa.config import EngineConfig
from fd_dsa.engine.argument_hints import CALL_HINTS, LLM_HINTS
from fd_dsa.engine.arguments import (
    Conversations,
    Message,
    Prompts,
    check_switches,
    explain_calls,
    naming,
    read_conversations,
    read_prompts,
    read_tools,
    read_variables,
)
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.sampling_params import (
    SAMPLING_FIELDS,
    Params,
    SamplingParams,
    fit_into_context,
    for_answer,
    read_params,
)
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import renaming
from fd_dsa.offline.shared_engine import SharedEngine
from fd_dsa.speculative_config import SpeculativeConfig

# hints for arguments of SamplingParams that a call gets by mistake
_SAMPLED = {name: f"write sampling_params=SamplingParams({name}=...)" for name in SAMPLING_FIELDS}
_LATER = {name: f"give SamplingParams({name}=...) to generate or chat" for name in SAMPLING_FIELDS}
_EXPLAIN_INIT = explain_calls({**_LATER, **LLM_HINTS})
_EXPLAIN_CALL = explain_calls({**_SAMPLED, **CALL_HINTS})


class LLM:
    """A model in this process, without a server.

        with LLM() as llm:
            print(llm.generate("Once upon a time")[0].outputs[0].text)

    Calls run in the caller's thread. Calls of several threads share the steps. Only warnings are
    logged, unless the logger `fd_dsa` has a level.

    Args:
        model: folder of a checkpoint in Hugging Face format; None = the demo model of the package.
        tokenizer, load_format, ...: the fields of `fd_dsa.config.EngineConfig`, which are also the
            flags of the server.

    Raises:
        ArgumentError: LLM has no argument of that name; the message has the right name.
        ConfigError: an argument, the folder or its checkpoint cannot be served.
    """

    _shared: SharedEngine

    @_EXPLAIN_INIT
    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        served_model_name: Sequence[str] = (),
        tokenizer: str | os.PathLike[str] | None = None,
        load_format: str = "auto",
        index_topk: int | None = None,
        allow_unknown_config_fields: bool = False,
        device: str = "auto",
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        target_inter_token_latency_ms: float = 0.0,
        block_size: int | None = None,
        kv_cache_memory_bytes: int | str | None = None,
        kv_offload_bytes: int | str = 0,
        gpu_memory_utilization: float = 0.9,
        num_gpu_blocks_override: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        async_scheduling: bool = True,
        enforce_eager: bool = False,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        cudagraph_prompt_sizes: Sequence[int] | None = None,
        speculative_config: SpeculativeConfig | Mapping[str, object] | str | None = None,
        generation_config: str = "auto",
        seed: int = 0,
        chat_template: str | os.PathLike[str] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        # not at the top: the factory imports paddle
        from fd_dsa.startup.build import build_engine

        if not logging.getLogger("fd_dsa").level:
            logging.getLogger("fd_dsa").setLevel(logging.WARNING)
        with renaming({f"--{name.replace('_', '-')}": name for name in given}):
            self._shared = SharedEngine(build_engine(EngineConfig(**given)))

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> LLM:
        """Make an LLM over an engine that is built already, and that only this LLM uses."""
        llm = cls.__new__(cls)
        llm._shared = SharedEngine(engine)
        return llm

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        return self.engine.tokenizer

    @overload
    def generate(
        self, prompts: Prompts, sampling_params: Params = None, stream: Literal[False] = False
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, stream: Literal[True]
    ) -> Iterator[RequestOutput]: ...

    @_EXPLAIN_CALL
    def generate(
        self, prompts: Prompts, sampling_params: Params = None, stream: bool = False
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue one prompt or several.

        Args:
            prompts: a text, token ids, or a list of either.
            sampling_params: one for all prompts, or a list with one for each; None = the defaults
                of `SamplingParams` with the proposals of the model's generation_config.json.
            stream: True = yield an output after every step. `request_id` is then "CALL-INDEX" with
                the index of the prompt. Closing the iterator aborts the unfinished requests.

        Returns:
            One `RequestOutput` for each prompt, in order, with all n outputs in `outputs`. An
            output that failed has `finish_reason` "error" and the reason in `error`. With `stream`,
            an iterator over the outputs of all prompts.

        Raises:
            ArgumentError: an argument has another type or form, or a prompt can never run. No
                prompt runs then. The error is a ValueError and a TypeError.
        """
        engine = self.engine
        check_switches(stream=stream)
        given = read_prompts(prompts)
        default = SamplingParams(**engine.sampling_defaults)
        params = read_params(sampling_params, len(given), default, "prompts")
        token_ids = []
        for index, one in enumerate(given):
            with naming("prompts", index, len(given), SAMPLING_FIELDS):
                token_ids.append(engine.tokenizer.encode(one) if isinstance(one, str) else one)
        texts = [one if isinstance(one, str) else None for one in given]
        return self._run("prompts", texts, token_ids, params, stream, sampling_params is None)

    @overload
    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        stream: Literal[False] = False,
        *,
        tools: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
        constrain_reasoning: bool = False,
        allow_special_tokens_in_text: bool = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        *,
        stream: Literal[True],
        tools: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
        constrain_reasoning: bool = False,
        allow_special_tokens_in_text: bool = False,
    ) -> Iterator[RequestOutput]: ...

    @_EXPLAIN_CALL
    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        stream: bool = False,
        *,
        tools: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, object] | None = None,
        constrain_reasoning: bool = False,
        allow_special_tokens_in_text: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer one conversation or several through the model's chat template.

        The text of an answer includes reasoning and calls with their markers, as the model writes
        them. `fd_dsa.chat.parser.OutputParser` takes them apart.

        Args:
            messages: a list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params: as in `generate`; None = the default, until the model ends, or
                `max_new_tokens` of generation_config.json or the context is full.
            stream: as in `generate`.
            tools: functions offered to the model, in the form of the OpenAI API.
            continue_final_message: True = the answer continues the last message, the assistant's.
            chat_template_kwargs: variables of the template, such as `thinking`.
            constrain_reasoning: True = `stop`, `min_tokens` and bad words begin with the
                reasoning. False = they begin with the answer after it, as structured output always
                does. The texts around the reasoning are those of the template, unless
                `SamplingParams.reasoning` is set.
            allow_special_tokens_in_text: True = markers of control tokens in messages and tools
                become these tokens. False = they are text. Calls in the text of an answer are sent
                back either with True, or as `tool_calls`.

        Returns:
            As `generate`, with one `RequestOutput` for each conversation.

        Raises:
            ArgumentError: as in `generate`; also if a message has no role or content, the model has
                no chat template, or the template refuses the messages.
        """
        engine = self.engine
        check_switches(
            stream=stream,
            continue_final_message=continue_final_message,
            constrain_reasoning=constrain_reasoning,
            allow_special_tokens_in_text=allow_special_tokens_in_text,
        )
        conversations = read_conversations(messages)
        count = len(conversations)
        offered, variables = read_tools(tools), read_variables(chat_template_kwargs)
        default = SamplingParams(**{"max_tokens": None, **engine.sampling_defaults})
        params = read_params(sampling_params, count, default, "conversations")
        texts: list[str | None] = []
        token_ids = []
        for index, entry in enumerate(conversations):
            with naming("messages", index, count, SAMPLING_FIELDS):
                prompt = engine.tokenizer.render_chat(
                    entry,
                    not continue_final_message,
                    tools=offered,
                    continue_final_message=continue_final_message,
                    allow_special_tokens_in_text=allow_special_tokens_in_text,
                    **variables,
                )
                ids = engine.tokenizer.encode(prompt.text, False, masked=prompt.masked)
            texts.append(prompt.text)
            token_ids.append(ids)
            continued = entry[-1] if continue_final_message else None
            answer = _answer_format(engine.tokenizer, bool(offered), prompt.masked, continued)
            params[index] = for_answer(params[index], engine.tokenizer, answer)
        if constrain_reasoning:
            params = [replace(one, constrain_reasoning=True) for one in params]
        return self._run("messages", texts, token_ids, params, stream, sampling_params is None)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Arguments of SamplingParams that the model proposes to calls without one."""
        return dict(self.engine.sampling_defaults)

    def stats(self) -> EngineStats:
        """Counters and load of the engine."""
        return self.engine.stats()

    def close(self) -> None:
        """Abort unfinished requests and release the model.

        Later calls raise RuntimeError.
        """
        self._shared.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> LLMEngine:
        """The engine that serves all calls.

        Raises:
            RuntimeError: the LLM is closed.
        """
        return self._shared.engine

    def _run(
        self,
        argument: str,
        texts: list[str | None],
        token_ids: list[list[int]],
        params: list[SamplingParams],
        stream: bool,
        is_default: bool,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Check the prompts of a call, then stream or collect.

        Args:
            argument: name of the argument that has the prompts.
            texts: of the prompts; None = the caller gave token ids.
            is_default: True = the caller gave no parameters, so that `max_tokens` fits the context.
        """
        engine = self.engine
        if is_default:
            params = fit_into_context(params, token_ids, engine.limits.max_model_len)
        for index, (ids, one) in enumerate(zip(token_ids, params, strict=True)):
            with naming(argument, index, len(params), SAMPLING_FIELDS):
                engine.validate(ids, one)
        outputs = self._shared.stream(texts, token_ids, params)
        if stream:
            return outputs
        finished = sorted(
            (output for output in outputs if output.finished),
            key=lambda output: (int(output.request_id.rpartition("-")[2]), output.index),
        )
        # the n outputs of a prompt follow each other
        ends = itertools.accumulate(one.n for one in params)
        return [
            RequestOutput.of_prompt(finished[end - one.n : end])
            for end, one in zip(ends, params, strict=True)
        ]


def _answer_format(
    tokenizer: Tokenizer, has_tools: bool, prompt: str, continued: Message | None
) -> AnswerFormat:
    """Return the format of the answers to a prompt that the tokenizer's template has rendered.

    Args:
        has_tools: True if the model may call tools.
        prompt: text of the prompt, whose markers show if the answer begins in the reasoning.
        continued: message that the answer continues, or None.
    """
    renderer = tokenizer.chat_renderer
    assert renderer is not None, "it has rendered the prompt"
    tool_format = renderer.tool_format() if has_tools else None
    return AnswerFormat(renderer.has_reasoning(), opens_reasoning(prompt, continued), tool_format)
