"""What one engine can ever run: the check of a request that needs no engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fd_dsa.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestLimits:
    """Sizes of an engine that bound its requests.

    Attributes:
        vocab_size: columns of the logits.
        max_model_len: longest prompt plus output, tokens.
        num_blocks: blocks of the caches.
        block_size: tokens per block.
        shows_selections: whether the runner can show what the indexer chose.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    shows_selections: bool = False

    def validate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Output tokens that a request may have.

        Raises:
            ValueError: the prompt is empty or holds no valid token ids, the request can never
                fit into the context or the cache, or a parameter names a token that the model
                lacks or asks for what the runner cannot show; names the numbers, and the
                parameter in front.
        """
        max_tokens = self._room(len(prompt_token_ids), params)
        self._check_prompt(prompt_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("bad_words_token_ids", params.bad_words_token_ids)
        if params.return_topk_positions and not self.shows_selections:
            raise ValueError(
                "return_topk_positions is true; what the indexer chose stays in the memory of this "
                "device, only a CPU shows it; leave it out or serve with --device cpu"
            )
        return max_tokens

    def _room(self, num_prompt: int, params: SamplingParams) -> int:
        """Output tokens that fit after a prompt of that length."""
        if num_prompt == 0:
            raise ValueError("the prompt has no tokens; it must have at least 1")
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, max_model_len is {self.max_model_len} and "
                "the output needs at least 1; shorten the prompt or raise max_model_len"
            )
        room = self.max_model_len - num_prompt
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together "
                f"{num_prompt + max_tokens}; max_model_len is {self.max_model_len}; lower "
                "max_tokens, shorten the prompt or raise max_model_len"
            )
        # the last token is never fed back, so it needs no place in the cache
        needed = -(-(num_prompt + max_tokens - 1) // self.block_size)
        if needed > self.num_blocks:
            raise ValueError(
                f"the prompt has {num_prompt} tokens and up to {max_tokens} follow, which need "
                f"{needed} cache blocks of {self.block_size} tokens; there are "
                f"{self.num_blocks}; lower max_tokens or give the cache more memory"
            )
        return max_tokens

    def _check_prompt(self, token_ids: Sequence[int]) -> None:
        """ValueError unless all are integers inside the vocabulary."""
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"the prompt has elements of type {ids.dtype}; it must be a flat list of integers"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self.vocab_size))
        if len(outside):
            raise ValueError(
                f"token {outside[0]} of the prompt is {ids[outside[0]]}; token ids of this model "
                f"are 0 to {self.vocab_size - 1}"
            )

    def _check_token_ids(self, name: str, token_ids: Iterable[int] | None) -> None:
        """ValueError unless the model has all of these tokens."""
        for token_id in token_ids or ():
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"{name} has the token id {token_id}; token ids of this model are 0 to "
                    f"{self.vocab_size - 1}"
                )
