"""From checked jobs to engine outputs: several prompts at once, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fd_dsa.engine.logit_rules import BadWords
from fd_dsa.engine.output import ConstraintError
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.serve.errors import ApiError, FieldError, request_error
from fd_dsa.serve.prompt_text import too_many_tokens
from fd_dsa.serve.protocol.generation import SAMPLING_FIELDS
from fd_dsa.serve.protocol.structured import STRUCTURED_FIELDS
from fd_dsa.serve.state import ServerState
from fd_dsa.serve.workers import cancel

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput

MAX_UNREAD_OUTPUTS = 2048
"""Outputs that a client may leave unread, beyond what the sockets' buffers hold."""

logger = logging.getLogger("fd_dsa.serve")
_requests_logger = logging.getLogger("fd_dsa.requests")


@dataclass(frozen=True)
class Job:
    """One prompt for the engine.

    Attributes:
        request_id: unique in this process.
        prompt_token_ids: the prompt.
        params: sampling parameters, `max_tokens` set.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


def resolve_max_tokens(
    state: ServerState,
    num_prompt_tokens: int,
    asked: int | None,
    *,
    default: int | None = None,
    param: str = "max_tokens",
    source: str = "prompt",
) -> int:
    """Most tokens to generate: what was asked for, or what the context has left.

    Args:
        state: for the engine's `max_model_len`.
        num_prompt_tokens: length of the prompt.
        asked: as requested, or None.
        default: upper bound where nothing was asked for.
        param: name of the request's field, for the message.
        source: the field that the prompt comes from.

    Raises:
        ApiError: 400, the prompt is empty, or it does not fit together with its output.
    """
    limit = state.engine.max_model_len
    if num_prompt_tokens == 0:
        raise FieldError(f"{source}: has no tokens; send at least one")
    longest = limit - num_prompt_tokens
    if longest < 1:
        raise too_many_tokens(state, num_prompt_tokens, source)
    if asked is None:
        return longest if default is None else min(default, longest)
    if asked > longest:
        raise FieldError(
            f"{param}: got {asked} after a prompt of {num_prompt_tokens} tokens, "
            f"max_model_len is {limit}; allowed is at most {longest} with this prompt",
            code="context_length_exceeded",
        )
    return asked


def check_jobs(state: ServerState, jobs: Sequence[Job], param: str) -> list[Job]:
    """Check that the engine could ever run these jobs of one request.

    Takes a while for long prompts, and tokenizes bad words.

    Returns:
        The jobs, with what the engine needs not do again.

    Raises:
        ApiError: 400 with the engine's reason and the field to blame: a sampling parameter, or
            `param`, which the prompt came from.
    """
    for job in jobs:
        with _refusals(param):
            state.engine.validate(job.prompt_token_ids, job.params)
    with _refusals("bad_words"):
        words = BadWords.of(jobs[0].params.bad_words, state.engine.tokenizer)
    if words is None:
        return list(jobs)
    return [replace(job, params=replace(job.params, bad_words=words)) for job in jobs]


async def check_form(state: ServerState, job: Job, param: str) -> None:
    """Let the engine compile the form of a job's output, if it is to have one.

    Raises:
        ApiError: as `check_jobs`.
    """
    if job.params.structured_outputs is not None:
        with _refusals(param):
            await state.engine.check_form(job.params.structured_outputs)


@contextlib.contextmanager
def _refusals(param: str) -> Iterator[None]:
    """Turn the engine's refusals into a 400."""
    try:
        yield
    except ValueError as error:
        refusal = request_error(error, (*SAMPLING_FIELDS, *STRUCTURED_FIELDS, "tools"))
        if refusal.param is None:
            refusal = FieldError(f"{param}: {error}")
        raise refusal from error


async def stream_outputs(
    state: ServerState, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all jobs as they come, each with the index of its job.

    Closing the iterator, or cancelling the task that reads it, aborts what is still running. So
    does a reader that is `MAX_UNREAD_OUTPUTS` outputs late: buffers do not grow without a bound.

    Raises:
        ApiError: 503, the server takes no requests any more; 500, a job or the engine failed;
            408, the reader is too slow.
    """
    state.check_available()
    began = time.monotonic()
    last: dict[tuple[int, int], RequestOutput] = {}
    # None: a job has ended; an exception: it has failed
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

    async def pump(index: int, job: Job) -> None:
        try:
            generate = state.engine.generate(job.prompt_token_ids, job.params, job.request_id)
            async with contextlib.aclosing(generate):
                # awaits nothing else, so a cancellation always reaches the engine's iterator
                async for output in generate:
                    if queue.qsize() >= MAX_UNREAD_OUTPUTS:
                        raise _too_slow(job)
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
                raise _failure_of(state, item)
            elif item[1].finish_reason == "error":
                raise _failure_alone(item[1])
            else:
                yield item
    finally:
        # first, since a task that is being cancelled gets no further than the next await
        for job_index, job in enumerate(jobs) if state.options.log_requests else ():
            for index in range(job.params.n):
                output = last.get((job_index, index))
                if output is None or not output.finished:
                    _log_end(job, index, output, began)
        await cancel(tasks)
        state.active.difference_update(job.request_id for job in jobs)


def _log_end(job: Job, index: int, last: RequestOutput | None, began: float) -> None:
    """The line of --log-requests for one output: counts and times, never texts.

    Args:
        job: of the output.
        index: of the output in its job.
        last: as the engine gave it last; one that is not finished was aborted.
        began: monotonic time at which the request reached the engine.
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


def _too_slow(job: Job) -> ApiError:
    """The error that ends a request whose client does not read; it gets it if it reads again."""
    logger.warning(
        "request %s: aborted, its client has not read %d outputs",
        job.request_id,
        MAX_UNREAD_OUTPUTS,
    )
    return ApiError(
        408,
        f"the client has not read {MAX_UNREAD_OUTPUTS} outputs, and the request was aborted; read "
        "streams as they come",
        code="client_too_slow",
    )


def _failure_of(state: ServerState, error: Exception) -> Exception:
    """What ends a request: the failure of the whole engine, which logs it, or its own error."""
    if state.engine.errored is None:
        return error
    return ApiError(500, "the engine has failed while it ran the request; the server is ending")


def _failure_alone(output: RequestOutput) -> ApiError:
    """What ends a request that failed by itself: a 400 where its own parameters are to blame."""
    status = 400 if isinstance(output.error, ConstraintError) else 500
    return ApiError(status, f"request {output.request_id!r}: {output.error or 'has failed'}")
