"""Hugging Face transformers as the oracle: logits, greedy tokens, and where they are undecided.

Needs torch and transformers. A position is undecided when the reference's own k-th and (k+1)-th
indexer or router scores lie within `NEAR_TIE` of the largest: rounding then decides the
selection, and nothing after that position can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import DeepseekV32ForCausalLM, GlmMoeDsaForCausalLM

from tests.parity.cases import GREEDY_PROMPT, GREEDY_STEPS, PROMPT_LENGTHS, Case

NEAR_TIE = 1e-6
_CLASSES = {"deepseek_v32": DeepseekV32ForCausalLM, "glm_moe_dsa": GlmMoeDsaForCausalLM}


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says of one prompt.

    Attributes:
        logits: float32 [len(prompt), vocab].
        decided: positions before the first undecided one; len(prompt) if there is none.
    """

    logits: np.ndarray
    decided: int


@dataclass(frozen=True)
class GreedyReference:
    """What Hugging Face generates after a prompt of `GREEDY_PROMPT` tokens.

    Attributes:
        tokens: int64 [GREEDY_STEPS].
        margins: float32 [GREEDY_STEPS]; the best logit over the second.
        decided: steps before the first with an undecided selection; GREEDY_STEPS if there is none.
    """

    tokens: np.ndarray
    margins: np.ndarray
    decided: int


class SelectionGaps:
    """Smallest relative gap between the last kept and the first dropped score, per token."""

    def __init__(self, n_group: int) -> None:
        self.n_group = n_group
        self.calls: list[np.ndarray] = []
        self._topk = torch.Tensor.topk

    def record(self, scores: Any, k: int) -> None:
        """Note one top-k over the last axis; sums of group pairs are no selection."""
        pair_sum = k == 2 and scores.dim() == 3 and scores.shape[1] == self.n_group
        if pair_sum or k >= scores.shape[-1]:
            return
        # eager attention masks with the lowest finite float
        scores = scores.float().masked_fill(scores < -1e30, float("-inf"))
        best = self._topk(scores, k + 1, -1).values
        gap = best[..., k - 1] - best[..., k]
        finite = scores.masked_fill(torch.isinf(scores), 0.0)
        relative = gap / finite.abs().amax(-1).clamp(min=1e-30)
        decided = torch.isinf(best[..., k])
        self.calls.append(relative.masked_fill(decided, float("inf")).reshape(-1).numpy())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch every `topk` of the forward passes inside."""
        function = torch.topk

        def method(scores: Any, k: int, *args: Any, **kwargs: Any) -> Any:
            self.record(scores, k)
            return self._topk(scores, k, *args, **kwargs)

        def call(scores: Any, k: int, *args: Any, **kwargs: Any) -> Any:
            self.record(scores, k)
            return function(scores, k, *args, **kwargs)

        with mock.patch.object(torch.Tensor, "topk", method), mock.patch("torch.topk", call):
            yield

    def decided(self, length: int) -> int:
        """Tokens before the first near tie of one forward over `length` new tokens."""
        smallest = np.min([call[:length] for call in self.calls], axis=0, initial=np.inf)
        undecided = np.flatnonzero(smallest < NEAR_TIE)
        return int(undecided[0]) if len(undecided) else length


class HuggingFaceModel:
    """One case in transformers, float32 on the CPU."""

    def __init__(self, case: Case, folder: Path) -> None:
        cls = _CLASSES[case.config["model_type"]]
        self.case = case
        self.model, info = cls.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        left = {key: info[key] for key in ("missing_keys", "unexpected_keys") if info[key]}
        if left:
            raise RuntimeError(f"{case.name}: transformers did not take the checkpoint: {left}")
        self.model.eval()

    @torch.no_grad()
    def reference(self, length: int) -> Reference:
        """One forward over the prompt of `length` tokens."""
        gaps = SelectionGaps(self.case.config["n_group"])
        with gaps.watching():
            logits = self.model(torch.tensor([self.case.prompt(length)])).logits[0]
        return Reference(logits.numpy(), gaps.decided(length))

    @torch.no_grad()
    def greedy(self) -> GreedyReference:
        """Greedy generation with a cache, one forward a step."""
        ids = torch.tensor([self.case.prompt(GREEDY_PROMPT)])
        cache, tokens, margins, decided = None, [], [], GREEDY_STEPS
        for step in range(GREEDY_STEPS):
            gaps = SelectionGaps(self.case.config["n_group"])
            with gaps.watching():
                out = self.model(ids, past_key_values=cache, use_cache=True)
            if gaps.decided(ids.shape[1]) < ids.shape[1]:
                decided = min(decided, step)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            ids = best.indices[:1][None]
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        return GreedyReference(np.array(tokens), np.array(margins, np.float32), decided)


def references(case: Case, folder: Path) -> tuple[dict[int, Reference], GreedyReference]:
    """Everything the parity tests compare for one case."""
    oracle = HuggingFaceModel(case, folder)
    return {length: oracle.reference(length) for length in PROMPT_LENGTHS}, oracle.greedy()
