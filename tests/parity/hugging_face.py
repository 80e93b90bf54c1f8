"""Hugging Face transformers as the oracle: logits, greedy tokens, and undecided selections.

Needs torch and transformers. A selection is undecided when the reference's own k-th and (k+1)-th
indexer or router scores lie within `NEAR_TIE` of the largest: rounding then decides it, so what
the reference selected there is recorded, for the other side to be fed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import (
    DeepseekV32ForCausalLM,
    DynamicCache,
    GlmMoeDsaForCausalLM,
    PreTrainedModel,
)

from tests.parity.cases import GREEDY_PROMPT, GREEDY_STEPS, PROMPT_LENGTHS, Case
from tests.parity.choices import Choice

NEAR_TIE = 1e-6
_CLASSES = {"deepseek_v32": DeepseekV32ForCausalLM, "glm_moe_dsa": GlmMoeDsaForCausalLM}


@dataclass(frozen=True)
class Reference:
    """Results of Hugging Face for one prompt.

    Attributes:
        logits: float32 [len(prompt), vocab].
        undecided: what it selected at the undecided positions.
    """

    logits: np.ndarray
    undecided: list[Choice]


@dataclass(frozen=True)
class GreedyReference:
    """Tokens that Hugging Face generates after a prompt of `GREEDY_PROMPT` tokens.

    Attributes:
        tokens: int64 [GREEDY_STEPS].
        margins: float32 [GREEDY_STEPS]; the best logit over the second.
        undecided: what it selected at the undecided positions.
    """

    tokens: np.ndarray
    margins: np.ndarray
    undecided: list[Choice]


class UndecidedSelections:
    """Records what the indexers and routers of a model select where their scores nearly tie."""

    def __init__(self, model: Any, n_group: int) -> None:
        self.n_group = n_group
        self.found: list[Choice] = []
        self._start = 0
        self._gaps: list[np.ndarray] = []
        self._topk = torch.Tensor.topk
        for index, layer in enumerate(model.model.layers):
            # a layer that shares a selection has no indexer, a dense one no gate
            self._watch(getattr(layer.self_attn, "indexer", None), "indexer", index)
            self._watch(getattr(layer.mlp, "gate", None), "router", index)

    def _watch(self, module: Any, kind: str, layer: int) -> None:
        """Note the undecided selections of a module after each of its forwards."""
        if module is None:
            return

        def before(*_: Any) -> None:
            self._gaps.clear()

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            selected = output[0] if kind == "indexer" else output[2]
            smallest = np.min(self._gaps, axis=0, initial=np.inf) if self._gaps else np.empty(0)
            for token in np.flatnonzero(smallest < NEAR_TIE).tolist():
                chosen = tuple(sorted(selected[token].tolist()))
                self.found.append(Choice(kind, layer, self._start + token, chosen))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

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
        self._gaps.append(relative.masked_fill(decided, float("inf")).reshape(-1).numpy())

    @contextmanager
    def watching(self, start: int = 0) -> Iterator[None]:
        """Watch every `topk` of the one forward inside, over the tokens from position `start`."""
        self._start = start
        function = torch.topk

        def method(scores: Any, k: int, *args: Any, **kwargs: Any) -> Any:
            self.record(scores, k)
            return self._topk(scores, k, *args, **kwargs)

        def call(scores: Any, k: int, *args: Any, **kwargs: Any) -> Any:
            self.record(scores, k)
            return function(scores, k, *args, **kwargs)

        with mock.patch.object(torch.Tensor, "topk", method), mock.patch("torch.topk", call):
            yield

    def take(self) -> list[Choice]:
        """Return the choices since the last call."""
        found, self.found = self.found, []
        return found


def give_latents_the_model_eps(model: Any) -> None:
    """Set the eps of the norms of both latents to `rms_norm_eps`.

    These norms have the default of their class in transformers, 1e-6. vLLM, SGLang and FastDeploy
    take `rms_norm_eps`, which is 1e-5 in GLM-5. fd_dsa follows config.json as they do, so that the
    comparison needs the same value on both sides.
    """
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm):
            norm.variance_epsilon = model.config.rms_norm_eps


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
        give_latents_the_model_eps(self.model)
        self.model.eval()
        self.selections = UndecidedSelections(self.model, case.config["n_group"])

    @torch.no_grad()
    def reference(self, length: int) -> Reference:
        """One forward over the prompt of `length` tokens."""
        with self.selections.watching():
            logits = self.model(torch.tensor([self.case.prompt(length)])).logits[0]
        return Reference(logits.numpy(), self.selections.take())

    @torch.no_grad()
    def greedy(self) -> GreedyReference:
        """Greedy generation with a cache, one forward a step."""
        ids = torch.tensor([self.case.prompt(GREEDY_PROMPT)])
        tokens, margins, done, cache = [], [], 0, new_cache(self.model)
        for _ in range(GREEDY_STEPS):
            with self.selections.watching(done):
                out = self.model(ids, **cache)
            done += ids.shape[1]
            best = out.logits[0, -1].topk(2)
            ids = best.indices[:1][None]
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        margins = np.array(margins, np.float32)
        return GreedyReference(np.array(tokens), margins, self.selections.take())


def new_cache(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """Argument of a model for its cache, which has another name from transformers 5.24 on."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return {name: DynamicCache(config=model.config)}


def references(case: Case, folder: Path) -> tuple[dict[int, Reference], GreedyReference]:
    """Everything the parity tests compare for one case."""
    oracle = HuggingFaceModel(case, folder)
    return {length: oracle.reference(length) for length in PROMPT_LENGTHS}, oracle.greedy()
