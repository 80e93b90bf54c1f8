"""POST /v1/completions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, PlainValidator, WithJsonSchema
from starlette.responses import Response

from fd_dsa.cancellation import check_cancelled
from fd_dsa.engine.detokenizer import new_detokenizer
from fd_dsa.serve.answer import Answer, respond, shown
from fd_dsa.serve.body import BodyRoute
from fd_dsa.serve.errors import show
from fd_dsa.serve.generation import (
    Job,
    check_answer_size,
    check_jobs,
    encode_prompt,
    resolve_max_tokens,
)
from fd_dsa.serve.logprobs import completion_logprobs
from fd_dsa.serve.protocol.answers import (
    Completion,
    CompletionChoice,
    CompletionEnd,
    CompletionLogprobs,
    Usage,
)
from fd_dsa.serve.protocol.fields import IDS, TEXT, TEXTS, is_token_ids, refuse
from fd_dsa.serve.protocol.generation import GenerationRequest
from fd_dsa.serve.protocol.known_fields import REFUSED_IN_COMPLETIONS
from fd_dsa.serve.state import ServerState, State

if TYPE_CHECKING:
    from fd_dsa.engine.logprobs import TokenLogprobs
    from fd_dsa.engine.output import RequestOutput


def _prompt(value: Any) -> list[str | list[int]]:
    """Return the prompts of a completion, each a string or token ids."""
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    entries = value if isinstance(value, list) else []
    if entries and all(isinstance(entry, str) for entry in entries):
        return entries
    if entries and all(is_token_ids(entry) for entry in entries):
        return entries
    raise refuse(
        f"got {show(value)}; allowed is a string, a list of strings, a list of token ids or a "
        "list of lists of token ids, each of them not empty"
    )


_PromptField = Annotated[
    list[str | list[int]],
    PlainValidator(_prompt),
    WithJsonSchema({"anyOf": [TEXT, TEXTS, IDS, {"type": "array", "items": IDS}]}),
]


_EXAMPLE = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}


class CompletionRequest(GenerationRequest, json_schema_extra={"examples": [_EXAMPLE]}):
    """Body of POST /v1/completions."""

    refused_fields = REFUSED_IN_COMPLETIONS

    prompt: _PromptField
    echo: bool | None = Field(None, description="Put the prompt in front of its answer.")
    logprobs: int | None = Field(
        None, description="Likeliest tokens scored for each token of the text, 0 to 20."
    )

    @property
    def only_echo(self) -> bool:
        """True if the answer is only the prompt."""
        return bool(self.echo) and self.max_tokens == 0

    def score_fields(self) -> dict[str, int | None]:
        """Return the numbers of scored tokens.

        With echo the prompt is scored like the output.
        """
        of_prompt = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            of_prompt = max(self.logprobs, of_prompt or 0)
        return {"logprobs": self.logprobs, "prompt_logprobs": of_prompt}


# default of the OpenAI API for completions; chat has no default
_DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=BodyRoute)


@router.post(
    "/v1/completions",
    summary="Continue a text or a list of token ids",
    response_model=Completion,
)
async def create_completion(body: CompletionRequest, request: Request, state: State) -> Response:
    """Continue each prompt and return its choices in the order of the prompts."""
    state.hold(request.scope["state"], len(body.prompt))
    make = functools.partial(_read_prompts, state, body)
    return await respond(make, "cmpl-", body, request, state)


def _read_prompts(
    state: ServerState, body: CompletionRequest, completion_id: str
) -> CompletionAnswer:
    jobs = []
    for index, prompt in enumerate(body.prompt):
        check_cancelled()
        field = f"prompt[{index}]" if len(body.prompt) > 1 else "prompt"
        if isinstance(prompt, str):
            prompt = encode_prompt(state, prompt, field, add_special_tokens=True)
        # the step that computes the last prompt token also samples one output token
        requested = 1 if body.only_echo else body.max_tokens
        max_tokens = resolve_max_tokens(
            state, len(prompt), requested, default=_DEFAULT_MAX_TOKENS, source=field
        )
        params = body.sampling_params(max_tokens, state.engine.sampling_defaults)
        jobs.append(Job(f"{completion_id}-{index}", field, prompt, params))
    check_answer_size(state.options.max_answer_scores, jobs, body, echo=bool(body.echo))
    return CompletionAnswer(state, body, check_jobs(state, jobs))


class CompletionAnswer(Answer[CompletionRequest]):
    """The answer to a completion. See `Answer`."""

    prompt_field = "prompt"
    whole_object = chunk_object = "text_completion"

    def __init__(self, state: ServerState, body: CompletionRequest, jobs: Sequence[Job]) -> None:
        super().__init__(state, body, jobs)
        # text of each prompt, in front of its answers
        self._echoes = [""] * len(jobs)
        for index, prompt in enumerate(body.prompt if body.echo else ()):
            if not isinstance(prompt, str):
                is_skipped = jobs[index].params.skip_special_tokens
                prompt = self.tokenizer.decode(prompt, skip_special_tokens=is_skipped)
            self._echoes[index] = prompt

    @property
    def is_short(self) -> bool:
        return not self.body.echo and super().is_short

    def is_small(self, job_index: int, output: RequestOutput) -> bool:
        is_echo = self.body.echo and (job_index, output.index) not in self.outputs
        return not is_echo and super().is_small(job_index, output)

    def choices(self) -> Iterator[CompletionChoice]:
        for job_index, job in enumerate(self.jobs):
            of_prompt = self.prompt_fields(self.outputs[job_index, 0])
            for index in range(job.params.n):
                output = self.outputs[job_index, index]
                choice = self._choice(job_index, output, is_first=True, is_whole=True)
                yield {**choice, **of_prompt}

    def deltas(self, job_index: int, output: RequestOutput) -> list[CompletionChoice]:
        """See `Answer`. A step without new text and scores returns an empty list."""
        is_first = (job_index, output.index) not in self.outputs
        choice = self._choice(job_index, output, is_first=is_first, is_whole=False)
        if is_first:
            choice = {**choice, **self.prompt_fields(output)}
        has_shown = choice["text"] or choice["logprobs"] or self.body.return_token_ids
        return [choice] if has_shown or output.finished else []

    def _choice(
        self, job_index: int, output: RequestOutput, *, is_first: bool, is_whole: bool
    ) -> CompletionChoice:
        """Return a choice of a whole answer, or the addition of one step.

        The first one has the echo.
        """
        text, token_ids, scored = shown(output, is_whole)
        if self.body.only_echo:
            text, token_ids, scored = "", (), ()
        has_echo = bool(is_first and self.body.echo)
        scores = None
        if self.body.logprobs is not None and (scored or has_echo or is_whole):
            scores = self._scores(job_index, output, scored, has_echo)
        choice: CompletionChoice = {
            "index": job_index * self.jobs[0].params.n + output.index,
            "text": self._echoes[job_index] * is_first + text,
            "logprobs": scores,
            "finish_reason": None,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return {**choice, **self._end(job_index, output)}

    def usage(self) -> Usage:
        """Return the token counts. A mere echo of the prompt has no output tokens."""
        usage = super().usage()
        if self.body.only_echo:
            usage["completion_tokens"] = 0
            usage["total_tokens"] = usage["prompt_tokens"]
        return usage

    def _end(self, job_index: int, output: RequestOutput) -> CompletionEnd:
        if not output.finished:
            return {"finish_reason": None}
        if self.body.only_echo:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": output.finish_reason, **self.end_fields(job_index, output)}

    def _scores(
        self, job_index: int, output: RequestOutput, scored: Sequence[TokenLogprobs], has_echo: bool
    ) -> CompletionLogprobs:
        prompt, echo = None, self._echoes[job_index]
        if has_echo:
            entries: Sequence[TokenLogprobs | None] = output.prompt_logprobs or ()
            if isinstance(self.body.prompt[job_index], str):
                entries = self._placed(entries, output.prompt_token_ids, echo)
            prompt = output.prompt_token_ids[0], entries
        return completion_logprobs(self.tokenizer, scored, len(echo), prompt)

    def _placed(
        self, entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], echo: str
    ) -> Sequence[TokenLogprobs | None]:
        """Return the scores of a prompt with their offsets in its echo, the text as it was sent.

        The echo has the markers of special tokens, for any `skip_special_tokens`. It lacks the
        tokens that the tokenizer adds.
        """
        detokenizer = new_detokenizer(self.tokenizer, skip_special_tokens=False)
        texts = [detokenizer.append(token_id) for token_id in token_ids]
        num_added = "".join(texts).find(echo)
        if num_added < 0:
            # the tokenizer changes the text, so that the echo has no exact offsets
            return entries
        offsets = [max(0, end - num_added) for end in itertools.accumulate(map(len, texts))]
        return [
            entry and entry._replace(text_offset=offset)
            for entry, offset in zip(entries, [0, *offsets], strict=False)
        ]
