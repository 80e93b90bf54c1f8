"""Generation: checks prompts, runs their jobs, and handles clients that disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fd_dsa.chat.control import RenderedPrompt
from fd_dsa.engine.encoding import TooManyTokens
from fd_dsa.engine.logit_rules import BadWords
from fd_dsa.engine.output import ConstraintError
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.errors import BusyError
from fd_dsa.serve.errors import ApiError, ContextLengthError, FieldError, request_error
from fd_dsa.serve.protocol.generation import SAMPLING_FIELDS, GenerationRequest
from fd_dsa.serve.protocol.structured import STRUCTURED_FIELDS
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import cancel

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput

# one log-probability weighs as much as this many prompt tokens repeated as text or ids
_TOKENS_PER_SCORE = 8


MAX_UNREAD_OUTPUTS = 2048
"""Outputs that a client may leave unread, in addition to the buffers of its socket."""

logger = logging.getLogger("fd_dsa.serve")
_requests_logger = logging.getLogger("fd_dsa.requests")


def encode_prompt(
    state: ServerState, prompt: str | RenderedPrompt, field: str, *, add_special_tokens: bool
) -> list[int]:
    """Tokenize a prompt into at most max_model_len ids.

    Slow for long texts: call it in a thread.

    Args:
        prompt: a rendered conversation, or a text in which every control-token marker counts.

    Raises:
        ApiError: 400 if the text has too many bytes or tokens, or is not valid Unicode.
    """
    rendered = RenderedPrompt(prompt, prompt) if isinstance(prompt, str) else prompt
    check_bytes(state, [rendered.text], field)
    limit = state.engine.max_model_len
    try:
        return state.engine.tokenizer.encode(
            rendered.text, add_special_tokens, limit, rendered.masked
        )
    except TooManyTokens as error:
        raise too_many_tokens(state, error.count, field) from error
    except ValueError as error:
        raise FieldError(f"{field}: {error}") from error


def check_bytes(state: ServerState, texts: Iterable[str], field: str) -> None:
    """Refuse texts that are together longer than --max-prompt-bytes."""
    # `surrogatepass`, because the tokenizer reports half of a surrogate pair
    num_bytes = sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        for text in texts
    )
    limit = state.options.prompt_bytes(state.engine.max_model_len)
    if num_bytes > limit:
        raise ContextLengthError(
            f"{field}: has {num_bytes} bytes of text; allowed are at most {limit}, the "
            "--max-prompt-bytes of this server; shorten the text",
            state.engine.max_model_len,
        )


def too_many_tokens(state: ServerState, num_tokens: int | str, field: str) -> ApiError:
    """Make the 400 of a prompt that leaves no room for an output.

    The text shows `num_tokens`.
    """
    limit = state.engine.max_model_len
    return ContextLengthError(
        f"{field}: the prompt has {num_tokens} tokens, max_model_len is {limit} and the output "
        "needs at least 1; shorten the prompt or start with a larger --max-model-len",
        limit,
    )


@dataclass(frozen=True)
class Job:
    """A prompt for the engine.

    Attributes:
        field: path of the prompt in the request, for error messages.
        each_call: makes the form of the calls of each tool. Called only to find the tool at fault
            if their common form cannot be compiled. Slow.
    """

    request_id: str
    field: str
    prompt_token_ids: list[int]
    params: SamplingParams
    each_call: Callable[[], Sequence[StructuredOutputsParams]] = tuple


def resolve_max_tokens(
    state: ServerState,
    num_prompt_tokens: int,
    requested: int | None,
    *,
    default: int | None = None,
    param: str = "max_tokens",
    source: str = "prompt",
) -> int:
    """Return the maximum number of tokens to generate.

    A number in the request counts. Otherwise it is the rest of the context, at most `default` and
    at most the number in the model's generation_config.json.

    Args:
        default: upper bound if the request has no number.
        param: name of the request's field, for error messages.
        source: field of the prompt.

    Raises:
        ApiError: 400 if the prompt is empty, or does not fit into the context with its output, or
            the requested number is below 1.
    """
    limit = state.engine.max_model_len
    if num_prompt_tokens == 0:
        raise FieldError(f"{source}: has no tokens; send at least one")
    longest = limit - num_prompt_tokens
    if longest < 1:
        raise too_many_tokens(state, num_prompt_tokens, source)
    if requested is None:
        bounds = (longest, default, state.engine.sampling_defaults.get("max_tokens"))
        return min(bound for bound in bounds if bound is not None)
    if requested < 1:
        raise FieldError(f"{param}: got {requested}; must be an integer >= 1")
    if requested > longest:
        raise ContextLengthError(
            f"{param}: got {requested} after a prompt of {num_prompt_tokens} tokens, "
            f"max_model_len is {limit}; allowed is at most {longest} with this prompt",
            limit,
            is_prompt=False,
        )
    return requested


def check_jobs(state: ServerState, jobs: Sequence[Job]) -> list[Job]:
    """Check that the engine can run these jobs of one request. Slow for long prompts.

    Returns:
        The jobs with tokenized bad words, so that the engine need not tokenize them again.

    Raises:
        ApiError: 400 with the engine's reason and the field at fault: a sampling parameter, or
            the field of the prompt.
    """
    for job in jobs:
        with _refusals(job.field):
            state.engine.validate(job.prompt_token_ids, job.params)
    bad_words = jobs[0].params.bad_words
    if not bad_words:
        return list(jobs)
    with _refusals("bad_words"):
        words = BadWords.of(bad_words, state.engine.tokenizer)
    return [replace(job, params=replace(job.params, bad_words=words)) for job in jobs]


async def check_form(state: ServerState, job: Job, param: str) -> None:
    """Compile the form of a job's output on the engine, if the job has one.

    Raises:
        ApiError: 400 if the form cannot be compiled, 429 if too many others are waiting.
    """
    if job.params.structured_outputs is None:
        return
    try:
        try:
            with _refusals(param):
                await state.engine.check_form(job.params)
        except ApiError as refusal:
            if refusal.param == "tools":
                await _check_each_call(state, job, param)
            raise
    except BusyError as error:
        raise ApiError(
            429, str(error), code="too_many_grammars", headers={"Retry-After": "5"}
        ) from error


async def _check_each_call(state: ServerState, job: Job, param: str) -> None:
    """Raise the refusal of the first tool whose calls cannot be compiled.

    See `check_form`.
    """
    for form in await asyncio.to_thread(job.each_call):
        with _refusals(param):
            await state.engine.check_form(replace(job.params, structured_outputs=form))


@contextlib.contextmanager
def _refusals(param: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        fields = (*SAMPLING_FIELDS, *STRUCTURED_FIELDS, "tools")
        raise request_error(error, fields, param) from error


async def stream_outputs(
    state: ServerState, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Run the jobs and yield (index of the job, output) as outputs arrive.

    Closing the iterator, or cancelling its task, aborts the jobs that still run. A reader that is
    `MAX_UNREAD_OUTPUTS` outputs late is aborted too, so that buffers stay bounded.

    Raises:
        ApiError: 503 if the server is shutting down, 500 after a failure of a job or the engine,
            408 for a slow reader.
    """
    state.check_available(is_accepted=True)
    began = time.monotonic()
    last: dict[tuple[int, int], RequestOutput] = {}
    # None: a job has ended; an exception: a job has failed
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

    async def pump(index: int, job: Job) -> None:
        try:
            generate = state.engine.generate(job.prompt_token_ids, job.params, job.request_id)
            async with contextlib.aclosing(generate):
                # only this await, so that a cancellation always reaches the engine's iterator
                async for output in generate:
                    if queue.qsize() >= MAX_UNREAD_OUTPUTS:
                        text = "request %s: aborted, its client has not read %d outputs"
                        logger.warning(text, job.request_id, MAX_UNREAD_OUTPUTS)
                        raise ApiError(
                            408,
                            f"the client has not read {MAX_UNREAD_OUTPUTS} outputs, and the "
                            "request was aborted; read streams as they come",
                            code="client_too_slow",
                        )
                    last[index, output.index] = output
                    if output.finished and state.options.log_requests:
                        _log_end(job, output.index, output, began)
                    queue.put_nowait((index, output))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)
        finally:
            state.active.discard(job.request_id)

    state.active.update(job.request_id for job in jobs)
    tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                if state.engine.errored is None:
                    try:
                        raise item
                    finally:
                        # its traceback has this frame
                        del item
                # the log has the engine's failure
                gone = "the engine has failed while it ran the request; the server is ending"
                raise ApiError(500, gone)
            elif item[1].finish_reason == "error":
                failed, error = item[1].request_id, item[1].error
                # a client error if the request's constraints exclude every token
                status = 400 if isinstance(error, ConstraintError) else 500
                raise ApiError(status, f"request {failed!r}: {error or 'has failed'}")
            else:
                yield item
    finally:
        # log before the next await, where a task that is being cancelled would end
        for job_index, job in enumerate(jobs) if state.options.log_requests else ():
            for index in range(job.params.n):
                output = last.get((job_index, index))
                if output is None or not output.finished:
                    _log_end(job, index, output, began)
        await cancel(tasks)
        while not queue.empty():
            # the traceback of an error has the frame of a task, which has the queue
            queue.get_nowait()
        state.active.difference_update(job.request_id for job in jobs)


def _log_end(job: Job, index: int, last: RequestOutput | None, began: float) -> None:
    """Log one output for --log-requests, with counts and times but no texts.

    Args:
        last: last output of the engine. An unfinished one was aborted.
        began: monotonic time at which the request reached the engine, seconds.
    """
    first = None if last is None else last.first_token_time
    fields = {
        "request_id": job.request_id,
        "index": index,
        "prompt_tokens": len(job.prompt_token_ids),
        "cached_tokens": 0 if last is None else last.num_cached_tokens,
        "completion_tokens": 0 if last is None else len(last.token_ids),
        "finish_reason": last.finish_reason if last is not None and last.finished else "abort",
        "first_token_s": None if first is None or last is None else first - last.arrival_time,
        "total_s": time.monotonic() - began,
    }
    shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
    _requests_logger.info("%s", ", ".join(shown), extra={"fields": fields})


def check_answer_size(
    limit: int,
    jobs: Sequence[Job],
    body: GenerationRequest,
    *,
    echo: bool = False,
    shows_prompt_once: bool = False,
) -> None:
    """Refuse a request whose answer could have too many log-probabilities.

    A scored token of output or prompt counts 1, plus 1 for each alternative. Eight repeated prompt
    tokens count 1. With `return_topk_positions` each token of prompt and output counts 1. The sum
    is multiplied by the number of choices that show it.

    Args:
        shows_prompt_once: True if the answer has the prompt's fields once, not in each choice.
    """
    total = sum(_scores_of(job, body, echo, shows_prompt_once) for job in jobs)
    if total <= limit:
        return
    params = jobs[0].params
    scored = {
        "prompt_logprobs": body.prompt_logprobs is not None,
        "logprobs": params.logprobs is not None,
        "return_topk_positions": params.return_topk_positions,
    }
    param = next((name for name, is_asked in scored.items() if is_asked), "n")
    num_choices = sum(job.params.n for job in jobs)
    num_tokens = max(len(job.prompt_token_ids) + (job.params.max_tokens or 0) for job in jobs)
    raise FieldError(
        f"{param}: the answer could have {total} log-probabilities, with {num_choices} choices of "
        f"up to {num_tokens} tokens each; --max-answer-scores is {limit}; ask for fewer choices, "
        "tokens or log-probabilities"
    )


def max_scored_tokens(limit: int, num_prompt_tokens: int, body: GenerationRequest) -> int | None:
    """Return the largest output length whose scores are allowed, or None without scores.

    Args:
        body: a request whose answer has the fields of its prompt once.

    Raises:
        ApiError: 400 if the number of log-probabilities is out of range.
    """
    fields = body.score_fields()
    likeliest, of_prompt = fields["logprobs"], fields["prompt_logprobs"]
    if likeliest is None:
        return None
    room = limit if of_prompt is None else limit - num_prompt_tokens * (1 + of_prompt)
    return max(1, room // (max(body.n or 1, 1) * (1 + likeliest)))


def _scores_of(job: Job, body: GenerationRequest, echo: bool, shows_prompt_once: bool) -> int:
    params, num_prompt = job.params, len(job.prompt_token_ids)
    num_output = params.max_tokens or 0
    of_choice = of_prompt = 0
    if params.logprobs is not None:
        of_choice += (1 + params.logprobs) * (num_output + num_prompt * echo)
    if params.return_topk_positions:
        of_choice += num_prompt + num_output
    if body.prompt_logprobs is not None:
        of_prompt += (1 + (params.prompt_logprobs or 0)) * num_prompt
    of_prompt += num_prompt * (echo + bool(body.return_token_ids)) // _TOKENS_PER_SCORE
    return params.n * of_choice + (1 if shows_prompt_once else params.n) * of_prompt
