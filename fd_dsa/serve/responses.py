"""Parts that the answers of both generating endpoints share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_dsa.engine.output import RequestOutput
    from fd_dsa.serve.generation import Job


def new_id(prefix: str) -> str:
    """An id as `chatcmpl-3f2a...`, new in every call."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_of(jobs: Sequence[Job], outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Token counts of one HTTP request: all its prompts, all its outputs.

    `cached_tokens` are those of the prompts that earlier requests had computed.
    """
    prompt = sum(len(job.prompt_token_ids) for job in jobs)
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.num_cached_tokens for output in outputs)
        },
    }


def with_usage(chunk: dict[str, Any], include_usage: bool) -> dict[str, Any]:
    """A chunk before the last: with `include_usage` it says that its usage is still null."""
    return {**chunk, "usage": None} if include_usage else chunk
