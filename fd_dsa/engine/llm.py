"""The engine without a server: prompts in, outputs back, all in the caller's thread."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

from fd_dsa.chat.parser import (
    AUTO,
    AnswerFormat,
    find_tool_format,
    has_reasoning,
    opens_reasoning,
)
from fd_dsa.chat.template import RESERVED
from fd_dsa.config import EngineConfig
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.reasoning import Reasoning
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import FdDsaError
from fd_dsa.speculative_config import SpeculativeConfig

Prompt = str | Sequence[int]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = dict[str, Any]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model in this process.

        with LLM() as llm:
            print(llm.generate("Once upon a time")[0].text)

    Only warnings are logged, unless the logger `fd_dsa` has a level.

    Args:
        model: folder of a checkpoint; None = the demo model of the package.
        tokenizer to chat_template: as the fields of `fd_dsa.config.EngineConfig`.

    Raises:
        ConfigError: an argument, the folder or its checkpoint cannot be served.
    """

    _engine: LLMEngine | None
    _calls: itertools.count[int]
    # where the outputs of an unfinished request go: the queue of its call
    _outbox: dict[str, deque[RequestOutput]]

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
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        target_inter_token_latency_ms: float = 0.0,
        block_size: int = 64,
        kv_cache_memory_bytes: int | str | None = None,
        gpu_memory_utilization: float = 0.9,
        num_gpu_blocks_override: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        async_scheduling: bool = True,
        enforce_eager: bool = False,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = None,
        generation_config: str = "auto",
        seed: int = 0,
        chat_template: str | os.PathLike[str] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        # not at the top: the factory imports paddle
        from fd_dsa.engine.factory import build_engine

        if not logging.getLogger("fd_dsa").level:
            logging.getLogger("fd_dsa").setLevel(logging.WARNING)
        try:
            self._start(build_engine(EngineConfig(**given)))
        except FdDsaError as error:
            error.args = tuple(_in_python(text, given) for text in error.args)
            raise

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> LLM:
        """An LLM over an engine that is built already and used by no one else."""
        llm = cls.__new__(cls)
        llm._start(engine)
        return llm

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        return self._open_engine().tokenizer

    @overload
    def generate(
        self, prompts: Prompts, sampling_params: Params = None, stream: Literal[False] = False
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self, prompts: Prompts, sampling_params: Params = None, *, stream: Literal[True]
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self, prompts: Prompts, sampling_params: Params = None, stream: bool = False
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue one prompt or several.

        Args:
            prompts: a text, token ids, or a list of either.
            sampling_params: one for all, or one for each prompt; None = `SamplingParams()` with
                what the model's generation_config.json proposes.
            stream: yield outputs as they come instead. `request_id` is "CALL-INDEX" with the
                index of the prompt; closing the iterator aborts what still runs.

        Returns:
            The last output of every prompt, in order, with n > 1 its n outputs in a row;
            `finish_reason` "error" and `error` where one failed alone. With `stream`, an iterator
            over all outputs.

        Raises:
            ValueError: a prompt can never run (then none does), or the counts differ.
        """
        engine = self._open_engine()
        encode = engine.tokenizer.encode
        token_ids = [encode(p) if isinstance(p, str) else list(p) for p in _as_list(prompts)]
        default = SamplingParams(**engine.sampling_defaults)
        params = _params_for(token_ids, sampling_params, default, engine.limits.max_model_len)
        return self._run(token_ids, params, stream)

    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        stream: bool = False,
        *,
        tools: Sequence[Message] | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        constrain_reasoning: bool = False,
        allow_special_tokens_in_text: bool = False,
    ) -> Any:
        """Answer one conversation or several, through the model's chat template; as `generate`.

        The text of an answer is what the model writes: reasoning and calls are in it with their
        markers, and `fd_dsa.chat.parser.OutputParser` takes them apart.

        Args:
            messages: a list of {"role", "content"}, or a list of such lists.
            sampling_params: as in `generate`; None = the default, until the model ends, or
                `max_new_tokens` of generation_config.json or the context is full.
            stream: as in `generate`.
            tools: offered to the model, in the form of the OpenAI API.
            continue_final_message: the answer goes on with the last message, the assistant's.
            chat_template_kwargs: variables of the template, such as `thinking`.
            constrain_reasoning: True: `stop`, `min_tokens` and bad words begin with the
                reasoning. Otherwise they begin after it, as a form does in any case. The texts
                around the reasoning are those of the template, unless `SamplingParams.reasoning`
                is set.
            allow_special_tokens_in_text: markers of control tokens in messages and tools become
                these tokens; by default they are text. The calls in the text of an answer are sent
                back either with this, or as `tool_calls`.

        Raises:
            ValueError: as in `generate`; or the folder has no chat template, or it refuses.
        """
        engine = self._open_engine()
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        variables = chat_template_kwargs or {}
        if reserved := [name for name in variables if name in RESERVED]:
            raise ValueError(
                f"chat_template_kwargs has {reserved[0]!r}, which is not a variable of the "
                "caller's; leave it out"
            )
        prompts = [
            engine.tokenizer.render_chat(
                entry,
                not continue_final_message,
                tools=tools,
                continue_final_message=continue_final_message,
                allow_special_tokens_in_text=allow_special_tokens_in_text,
                **variables,
            )
            for entry in conversations
        ]
        token_ids = [engine.tokenizer.encode(p.text, False, masked=p.masked) for p in prompts]
        default = SamplingParams(**{"max_tokens": None, **engine.sampling_defaults})
        params = _params_for(token_ids, sampling_params, default, engine.limits.max_model_len)
        params = [
            _for_chat(
                one,
                engine.tokenizer,
                bool(tools),
                prompt.masked,
                entry[-1] if continue_final_message else None,
            )
            for one, prompt, entry in zip(params, prompts, conversations, strict=True)
        ]
        if constrain_reasoning:
            params = [replace(one, constrain_reasoning=True) for one in params]
        return self._run(token_ids, params, stream)

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of SamplingParams that the model proposes to callers who give none."""
        return dict(self._open_engine().sampling_defaults)

    def stats(self) -> EngineStats:
        """Counters and load of the engine."""
        return self._open_engine().stats()

    def close(self) -> None:
        """Abort what runs and let go of the model; the LLM cannot be used any more."""
        if self._engine is not None:
            self._engine.abort_all()
            ranks = getattr(self._engine.runner, "ranks", None)
            if ranks is not None:
                ranks.close()
        self._outbox.clear()
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, engine: LLMEngine) -> None:
        """Take an engine."""
        self._engine = engine
        self._calls = itertools.count()
        self._outbox = {}

    def _open_engine(self) -> LLMEngine:
        """The engine; RuntimeError after `close`."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed; make a new one")
        return self._engine

    def _run(
        self, token_ids: list[list[int]], params: list[SamplingParams], stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Check the prompts of a call, then stream or collect."""
        engine = self._open_engine()
        for ids, one in zip(token_ids, params, strict=True):
            engine.validate(ids, one)
        outputs = self._stream(token_ids, params)
        if stream:
            return outputs
        return sorted(
            (output for output in outputs if output.finished),
            key=lambda output: (int(output.request_id.rpartition("-")[2]), output.index),
        )

    def _stream(
        self, token_ids: list[list[int]], params: list[SamplingParams]
    ) -> Iterator[RequestOutput]:
        """Outputs of one call; steps the engine for all calls while its own queue is empty."""
        engine = self._open_engine()
        call = next(self._calls)
        queue: deque[RequestOutput] = deque()
        request_ids = []
        try:
            for index, (ids, one) in enumerate(zip(token_ids, params, strict=True)):
                request_id = f"{call}-{index}"
                engine.add_request(request_id, ids, one)
                self._outbox[request_id] = queue
                request_ids.append(request_id)
            num_running = sum(one.n for one in params)
            while num_running:
                while not queue:
                    for new in self._open_engine().step():
                        self._outbox[new.request_id].append(new)
                output = queue.popleft()
                num_running -= output.finished
                yield output
        finally:
            for request_id in request_ids:
                if self._outbox.pop(request_id, None) is not None:
                    engine.abort_request(request_id)


def _in_python(text: Any, names: Iterable[str]) -> Any:
    """A message with these names instead of those of the flags."""
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        text = re.sub(rf"{flag}(?![\w-])", name, str(text))
    return text


def _for_chat(
    params: SamplingParams,
    tokenizer: Tokenizer,
    has_tools: bool,
    prompt: str,
    continued: Message | None,
) -> SamplingParams:
    """Add the markers that separate the parts of an answer.

    Args:
        prompt: its markers show if the answer begins in the reasoning.
        continued: the message that the answer continues.
    """
    renderer = tokenizer.chat_renderer
    if renderer is None:
        return params
    source, model_type = renderer.source, renderer.model_type
    tool_format = find_tool_format(AUTO, source, model_type) if has_tools else None
    answer = AnswerFormat(has_reasoning(AUTO, source), tool_format=tool_format)
    reasoning = params.reasoning
    if answer.has_reasoning and reasoning is None:
        in_reasoning = opens_reasoning(prompt, continued)
        reasoning = Reasoning.of(replace(answer, in_reasoning=in_reasoning))
    kept = frozenset(tokenizer.special_ids_of(answer.markers).values())
    return replace(
        params,
        kept_special_token_ids=params.kept_special_token_ids | kept,
        reasoning=reasoning,
    )


def _as_list(prompts: Prompts) -> list[Prompt]:
    """Prompts as a list, whichever of the four forms they have."""
    if isinstance(prompts, str):
        return [prompts]
    several: list[Any] = list(prompts)
    if several and not isinstance(several[0], (str, Sequence)) and hasattr(several[0], "__index__"):
        return [several]
    return several


def _params_for(
    prompts: Sequence[Sequence[int]], params: Params, default: SamplingParams, max_model_len: int
) -> list[SamplingParams]:
    """Return one SamplingParams for each prompt; a default fits into the context."""
    count = len(prompts)
    if params is None:
        rooms = (max(max_model_len - len(prompt), 1) for prompt in prompts)
        most = default.max_tokens
        return [
            default if most is None else replace(default, max_tokens=min(most, room))
            for room in rooms
        ]
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts; give one for all, or "
            "one for each"
        )
    return list(params)
