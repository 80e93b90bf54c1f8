"""POST /v1/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fd_dsa.serve.answer_size import check_answer_size
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.generation import (
    Job,
    check_form,
    check_jobs,
    collect_outputs,
    resolve_max_tokens,
    stream_outputs,
)
from fd_dsa.serve.json_response import JsonResponse
from fd_dsa.serve.logprobs import Columns, completion_logprobs, output_columns, prompt_columns
from fd_dsa.serve.prompt_text import encode_prompt
from fd_dsa.serve.protocol import CompletionRequest
from fd_dsa.serve.responses import (
    end_fields,
    is_short,
    new_id,
    prompt_fields,
    usage_of,
    with_usage,
)
from fd_dsa.serve.sse import EventStream
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput
    from fd_dsa.engine.tokenizer import Tokenizer

# the OpenAI API's default for completions; chat has none
_DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/completions", summary="Continue a text or a list of token ids")
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue each prompt; one choice per prompt, in their order."""
    state.check_available()
    model = state.resolve_model(body.model)
    request.state.ticket.extend(len(body.prompt))
    completion_id = new_id("cmpl")
    choices = await state.prompt_workers.run(
        _read_prompts, state, body, completion_id, request=request
    )
    jobs = choices.jobs
    await check_form(state, jobs[0], "prompt")
    request.state.ticket.extend(sum(job.params.n for job in jobs), "n")
    head = {
        "id": completion_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    if body.stream:
        chunks = _chunks(state, head, choices)
        return EventStream(chunks, request.state.request_id)
    outputs = await collect_outputs(state, jobs, request)
    return await state.workers.run(
        choices.answer,
        head,
        outputs,
        request=request,
        is_short=not body.echo and is_short(jobs, outputs, body),
    )


def _read_prompts(state: ServerState, body: CompletionRequest, completion_id: str) -> _Choices:
    """Tokenise and check the prompts; runs in a thread, since that may take a while."""
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
    check_answer_size(state.options.max_answer_scores, jobs, body, echo=bool(body.echo))
    jobs = check_jobs(state, jobs, "prompt")
    return _Choices(state.engine.tokenizer, body, jobs)


async def _chunks(
    state: ServerState, head: dict[str, Any], choices: _Choices
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed completion, those of all choices as they come."""
    last: dict[tuple[int, int], RequestOutput] = {}
    async with contextlib.aclosing(stream_outputs(state, choices.jobs)) as outputs:
        async for job_index, output in outputs:
            key = job_index, output.index
            is_first = key not in last
            is_small = choices.is_small(output, is_first)
            choice = await state.workers.run(
                choices.delta, job_index, output, is_first, is_short=is_small
            )
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
        self.jobs = jobs
        self._tokenizer = tokenizer
        self._echoes = [
            self._echo(job, prompt) for job, prompt in zip(jobs, body.prompt, strict=True)
        ]
        # what all choices of a prompt tell of it, made for the first one
        self._prompt_columns: dict[int, Columns] = {}
        self._prompt_fields: dict[int, dict[str, Any]] = {}

    def answer(self, head: dict[str, Any], outputs: Sequence[RequestOutput]) -> JsonResponse:
        """The whole answer."""
        choices = [self._whole(index, output) for index, output in enumerate(outputs)]
        return JsonResponse({**head, "choices": choices, "usage": self.usage(outputs)})

    def _whole(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A finished choice."""
        job_index = index // self.jobs[0].params.n
        if job_index not in self._prompt_fields:
            fields = prompt_fields(self._tokenizer, self.body, output)
            self._prompt_fields[job_index] = fields
        is_shown = not self.body.only_echo
        choice = {
            "index": index,
            "text": self._echoes[job_index] + output.text * is_shown,
            "logprobs": None,
            **self._end(job_index, output),
            **self._prompt_fields[job_index],
        }
        if self.body.logprobs is not None:
            scored = (output.logprobs or []) if is_shown else []
            columns = output_columns(self._tokenizer, scored, len(self._echoes[job_index]))
            choice["logprobs"] = completion_logprobs(*self._of_prompt(job_index, output), columns)
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids if is_shown else []
        return choice

    def is_small(self, output: RequestOutput, is_first: bool) -> bool:
        """Whether a chunk tells of a step alone, and not of the prompt or of all positions."""
        return not (is_first and self.body.echo) and output.topk_positions is None

    def delta(self, job_index: int, output: RequestOutput, is_first: bool) -> dict[str, Any] | None:
        """What one step has added to a choice; None when there is nothing to tell."""
        echo = self._echoes[job_index] if is_first else ""
        text = echo + output.new_text * (not self.body.only_echo)
        if not (text or output.finish_reason or self.body.return_token_ids):
            return None
        choice = {
            "index": job_index * self.jobs[0].params.n + output.index,
            "text": text,
            "logprobs": self._new_scores(job_index, output, is_first),
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
        more = end_fields(self._tokenizer, self.jobs[job_index], output)
        return {"finish_reason": output.finish_reason, **more}

    def usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Token counts; a prompt that is the whole answer has no output."""
        usage = usage_of(self.jobs, outputs)
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

    def _new_scores(
        self, job_index: int, output: RequestOutput, is_first: bool
    ) -> dict[str, Any] | None:
        """`logprobs` of a chunk, None where it has none."""
        of_prompt = self._of_prompt(job_index, output) if is_first else []
        scored = [] if self.body.only_echo else output.new_logprobs
        if self.body.logprobs is None or not (of_prompt or scored):
            return None
        columns = output_columns(self._tokenizer, scored, len(self._echoes[job_index]))
        return completion_logprobs(*of_prompt, columns)

    def _of_prompt(self, job_index: int, output: RequestOutput) -> list[Columns]:
        """Scores of a prompt that is repeated."""
        if not self.body.echo or self.body.logprobs is None:
            return []
        if job_index not in self._prompt_columns:
            self._prompt_columns[job_index] = prompt_columns(
                self._tokenizer, output.prompt_token_ids[0], output.prompt_logprobs or ()
            )
        return [self._prompt_columns[job_index]]
