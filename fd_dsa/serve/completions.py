"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from fd_dsa.serve.generation import (
    Job,
    check_jobs,
    collect_outputs,
    resolve_max_tokens,
    stream_outputs,
)
from fd_dsa.serve.logprobs import completion_logprobs
from fd_dsa.serve.prompt_text import encode_prompt
from fd_dsa.serve.protocol import CompletionRequest
from fd_dsa.serve.responses import end_fields, new_id, prompt_fields, usage_of, with_usage
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput
    from fd_dsa.engine.tokenizer import Tokenizer

# the OpenAI API's default for completions; chat has none
_DEFAULT_MAX_TOKENS = 16

router = APIRouter()


@router.post("/v1/completions", summary="Continue a text or a list of token ids")
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue each prompt; one choice per prompt, in their order."""
    state.check_available()
    model = state.resolve_model(body.model)
    body.check_supported()
    request.state.ticket.extend(len(body.prompt))
    completion_id = new_id("cmpl")
    jobs, choices = await asyncio.to_thread(_prepare, state, body, completion_id)
    request.state.ticket.extend(sum(job.params.n for job in jobs), "n")
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        chunks = _chunks(state, jobs, head, choices)
        return EventStream(chunks, request.state.request_id)
    outputs = await collect_outputs(state, jobs, request)
    whole = [choices.whole(index, output) for index, output in enumerate(outputs)]
    return JSONResponse({**head, "choices": whole, "usage": choices.usage(outputs)})


def _prepare(
    state: ServerState, body: CompletionRequest, completion_id: str
) -> tuple[list[Job], _Choices]:
    """Tokenize, check and echo the prompts; runs in a thread, since that may take a while."""
    jobs = []
    for index, prompt in enumerate(body.prompt):
        if isinstance(prompt, str):
            prompt = encode_prompt(state, prompt, "prompt", add_special_tokens=True)
        # a step that reads the last token of the prompt gives one of the output
        asked = 1 if body.only_echo else body.max_tokens
        max_tokens = resolve_max_tokens(state, len(prompt), asked, default=_DEFAULT_MAX_TOKENS)
        jobs.append(
            Job(
                f"{completion_id}-{index}",
                prompt,
                body.sampling_params(max_tokens, state.engine.sampling_defaults),
            )
        )
    jobs = check_jobs(state, jobs, "prompt")
    return jobs, _Choices(state.engine.tokenizer, body, jobs)


async def _chunks(
    state: ServerState, jobs: Sequence[Job], head: dict[str, Any], choices: _Choices
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed completion, those of all choices as they come."""
    last: dict[tuple[int, int], RequestOutput] = {}
    async with contextlib.aclosing(stream_outputs(state, jobs)) as outputs:
        async for job_index, output in outputs:
            key = job_index, output.index
            choice = choices.delta(job_index, output, is_first=key not in last)
            last[key] = output
            if choice is not None:
                yield with_usage({**head, "choices": [choice]}, choices.body.include_usage)
    if choices.body.include_usage:
        yield {**head, "choices": [], "usage": choices.usage(list(last.values()))}


class _Choices:
    """Choices of one completion in the shape of the OpenAI API, whole or in chunks.

    Args:
        tokenizer: for texts of prompts and tokens.
        body: of the request.
        jobs: its prompts; n choices follow each other for each of them.
    """

    def __init__(self, tokenizer: Tokenizer, body: CompletionRequest, jobs: Sequence[Job]) -> None:
        self.body = body
        self._tokenizer = tokenizer
        self._jobs = jobs
        self._echoes = [
            self._echo(job, prompt) for job, prompt in zip(jobs, body.prompt, strict=True)
        ]

    def whole(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A finished choice."""
        job_index = index // self._jobs[0].params.n
        echo = self._echoes[job_index]
        is_shown = not self.body.only_echo
        choice = {
            "index": index,
            "text": echo + output.text * is_shown,
            "logprobs": self._scores(output, output.logprobs, echo, is_first=True),
            **self._end(job_index, output),
            **prompt_fields(self._tokenizer, self.body, output),
        }
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids if is_shown else []
        return choice

    def delta(
        self, job_index: int, output: RequestOutput, *, is_first: bool
    ) -> dict[str, Any] | None:
        """What one step has added to a choice; None when there is nothing to tell."""
        echo = self._echoes[job_index] if is_first else ""
        text = echo + output.new_text * (not self.body.only_echo)
        if not (text or output.finish_reason or self.body.return_token_ids):
            return None
        scores = self._scores(output, output.new_logprobs, self._echoes[job_index], is_first)
        choice = {
            "index": job_index * self._jobs[0].params.n + output.index,
            "text": text,
            "logprobs": scores if scores and scores["tokens"] else None,
            **self._end(job_index, output),
        }
        if self.body.return_token_ids:
            choice["token_ids"] = [] if self.body.only_echo else output.new_token_ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _end(self, job_index: int, output: RequestOutput) -> dict[str, Any]:
        """Why a choice has ended, None while it has not, and what is told with it."""
        if not output.finished:
            return {"finish_reason": None}
        if self.body.only_echo:
            return {"finish_reason": "length", "stop_reason": None}
        more = end_fields(self._tokenizer, self._jobs[job_index], output)
        return {"finish_reason": output.finish_reason, **more}

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Token counts; a prompt that is the whole answer has no output."""
        usage = usage_of(self._jobs, outputs)
        if self.body.only_echo:
            usage.update(completion_tokens=0, total_tokens=usage["prompt_tokens"])
        return usage

    def _echo(self, job: Job, prompt: str | list[int]) -> str:
        """The text of a prompt that its answer begins with."""
        if not self.body.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        is_skipped = job.params.skip_special_tokens
        return self._tokenizer.decode(prompt, skip_special_tokens=is_skipped)

    def _scores(
        self,
        output: RequestOutput,
        entries: Sequence[TokenLogprobs] | None,
        echo: str,
        is_first: bool,
    ) -> dict[str, Any] | None:
        """Scores of the tokens of a choice's text, those of its prompt where that is shown."""
        if self.body.logprobs is None:
            return None
        shows_prompt = bool(self.body.echo) and is_first
        return completion_logprobs(
            self._tokenizer,
            [] if self.body.only_echo else entries or [],
            prompt=(output.prompt_logprobs or ()) if shows_prompt else (),
            first_token_id=output.prompt_token_ids[0] if shows_prompt else None,
            text_offset=len(echo),
        )
