"""Parts that the answers of both generating endpoints share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fd_dsa.serve.json_response import packed, packed_list, slices
from fd_dsa.serve.logprobs import prompt_logprobs, token_text

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput
    from fd_dsa.engine.tokenizer import Tokenizer
    from fd_dsa.serve.generation import Job
    from fd_dsa.serve.protocol.generation import GenerationRequest


# of a whole answer: 0.1 ms
_SHORT_TOKENS = 4096


def new_id(prefix: str) -> str:
    """An id as `chatcmpl-3f2a...`, new in every call."""
    return f"{prefix}-{uuid.uuid4().hex}"


def is_short(
    jobs: Sequence[Job], outputs: Sequence[RequestOutput], body: GenerationRequest
) -> bool:
    """Whether a whole answer is written in less time than a thread takes to begin.

    Args:
        jobs: prompts of the request.
        outputs: the last ones.
        body: of the request.
    """
    params = jobs[0].params
    is_scored = params.logprobs is not None or params.prompt_logprobs is not None
    if is_scored or params.return_topk_positions or body.return_token_ids:
        return False
    return sum(output.num_tokens for output in outputs) <= _SHORT_TOKENS


def usage_of(jobs: Sequence[Job], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Token counts of one HTTP request: each of its prompts once, all its outputs.

    `cached_tokens` are those of the prompts that earlier requests had computed.
    """
    prompt = sum(len(job.prompt_token_ids) for job in jobs)
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(out.num_cached_tokens for out in outputs if out.index == 0)
        },
    }


def with_usage(chunk: dict[str, Any], include_usage: bool) -> dict[str, Any]:
    """A chunk before the last: with `include_usage` it says that its usage is still null."""
    return {**chunk, "usage": None} if include_usage else chunk


def end_fields(tokenizer: Tokenizer, job: Job, output: RequestOutput) -> dict[str, Any]:
    """What a choice tells at its end beside its reason: `stop_reason`, `topk_positions`.

    Args:
        tokenizer: for the texts of tokens.
        job: that the choice belongs to.
        output: its last one.
    """
    stop: str | int | None = output.stop_reason
    # as in vLLM: an end of sequence that nobody asked to stop at is no reason to name
    if isinstance(stop, int) and stop not in (job.params.stop_token_ids or ()):
        stop = None
    return {"stop_reason": stop, **_topk_fields(tokenizer, output)}


def _topk_fields(tokenizer: Tokenizer, output: RequestOutput) -> dict[str, Any]:
    """`topk_positions` of a choice, where asked for."""
    chosen = output.topk_positions
    if chosen is None:
        return {}
    token_ids = [*output.prompt_token_ids, *output.token_ids][: chosen.position + 1]
    texts = ([token_text(tokenizer, token) for token in part] for part in slices(token_ids))
    found = {
        "position": chosen.position,
        "layers": [packed_list(packed([layer.tolist()])) for layer in chosen.layers],
        "tokens": packed_list(packed(texts)),
    }
    return {"topk_positions": found}


def prompt_fields(
    tokenizer: Tokenizer, body: GenerationRequest, output: RequestOutput
) -> dict[str, Any]:
    """What an answer tells of its prompt: `prompt_logprobs`, `prompt_token_ids`, where asked for.

    Args:
        tokenizer: for the texts of tokens.
        body: of the request.
        output: one of the prompt.
    """
    fields: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        scores = output.prompt_logprobs
        fields["prompt_logprobs"] = None if scores is None else prompt_logprobs(tokenizer, scores)
    if body.return_token_ids:
        fields["prompt_token_ids"] = output.prompt_token_ids
    return fields
