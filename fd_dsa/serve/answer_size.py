"""The bound on an answer: how many log-probabilities it may have, before the engine is asked."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.generation import Job
from fd_dsa.serve.protocol.generation import GenerationRequest

# tokens of a prompt that an answer repeats as text or ids, for each log-probability
_TOKENS_PER_SCORE = 8


def check_answer_size(
    limit: int,
    jobs: Sequence[Job],
    body: GenerationRequest,
    *,
    echo: bool = False,
    shows_prompt_once: bool = False,
) -> None:
    """Refuse a request whose answer could have too many log-probabilities.

    Each token of an output or a prompt that is scored counts 1 and as many as are scored beside
    it; eight tokens of a prompt that is repeated count 1; with `return_topk_positions` each token
    of prompt and output counts 1. All of that is multiplied by the choices that show it.

    Args:
        limit: the --max-answer-scores of the server.
        jobs: prompts of the request.
        body: of the request.
        echo: whether each choice begins with its prompt.
        shows_prompt_once: whether an answer has the fields of a prompt once, not in each choice.

    Raises:
        ApiError: 400.
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


def most_scored_tokens(limit: int, num_prompt_tokens: int, body: GenerationRequest) -> int | None:
    """Tokens of an output for whose scores there is room; None: they are not scored.

    Args:
        limit: the --max-answer-scores of the server.
        num_prompt_tokens: of the one prompt.
        body: of a request whose answer has the fields of its prompt once.

    Raises:
        ApiError: 400, the number of log-probabilities is out of range.
    """
    fields = body.score_fields()
    beside, of_prompt = fields["logprobs"], fields["prompt_logprobs"]
    if beside is None:
        return None
    room = limit if of_prompt is None else limit - num_prompt_tokens * (1 + of_prompt)
    return max(1, room // (max(body.n or 1, 1) * (1 + beside)))


def _scores_of(job: Job, body: GenerationRequest, echo: bool, shows_prompt_once: bool) -> int:
    """What all choices of one prompt count."""
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
