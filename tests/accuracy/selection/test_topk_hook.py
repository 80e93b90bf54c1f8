"""The recording backend, which writes down what the layers did and changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fd_dsa.accuracy.embedded import SingleSequenceRunner
from fd_dsa.accuracy.selection.measure import exactness, index_scores
from fd_dsa.accuracy.selection.topk_hook import (
    RecordingBackend,
    host_copy,
    read_index_keys,
    read_latents,
    recording,
)
from fd_dsa.runner import InputBatch, ModelRunner
from tests.models.folders import TINY
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_attend
from tests.reference.topk import ref_topk
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import GLM, V32, tiny_model, tiny_runner

TOKENS = np.random.default_rng(5).integers(2, 50, 40).tolist()
# in the first chunk, at its end, in the second one, and two that are decoded
WATCHED = (3, 12, 13, 19, 20, 35, 38, 39)
# the widths that an fp8_ds_mla cache takes
FP8 = TINY | {
    "index_topk": 12,
    "index_n_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
}


class Watching(RecordingBackend):
    """Keeps the layers' outputs too."""

    def attend(self, q: Any, selection: Any, layer_id: int, forward_meta: Any) -> Any:
        """See DSAAttentionBackend."""
        out = super().attend(q, selection, layer_id, forward_meta)
        positions = host_copy(self.current_step(forward_meta).position_ids)
        for token, position in enumerate(positions.tolist()):
            self.outputs[layer_id, position] = host_copy(out[token])
        return out

    def watch(self, positions: Any) -> None:
        """See RecordingBackend."""
        super().watch(positions)
        self.outputs: dict[tuple[int, int], np.ndarray] = {}


def run_all(sequence: SingleSequenceRunner, tokens: list[int]) -> list[np.ndarray]:
    """Two chunks and two decoded tokens: hidden states of all."""
    sequence.length = 0
    half, end = len(tokens) // 2, len(tokens) - 2
    hidden = [sequence.run(tokens[:half]), sequence.run(tokens[half:end])]
    hidden += [sequence.run([token], decode=True) for token in tokens[end:]]
    return [host_copy(part) for part in hidden]


def recorded(
    fields: dict[str, Any], kv_cache_dtype: str, device: str = "cpu", num_tokens: int = 40
) -> tuple[SingleSequenceRunner, Watching, list[np.ndarray]]:
    """A tiny model's run, watched."""
    model = tiny_model(fields, device=device)
    sequence = SingleSequenceRunner(runner_for(model, kv_cache_dtype, device))
    # not the order of their ids: a slot is no position
    sequence.block_table = sequence.block_table[::-1].copy()
    with recording(sequence.runner, Watching) as backend:
        backend.watch(WATCHED)
        hidden = run_all(sequence, TOKENS[:num_tokens])
    return sequence, backend, hidden


def runner_for(model: Any, kv_cache_dtype: str, device: str) -> ModelRunner:
    """A runner for one row."""
    size = 64 if kv_cache_dtype == "fp8_ds_mla" else 16
    batch, layout = InputBatch(1, 64, 4, size), model.config.cache_layout(kv_cache_dtype, size)
    return dsa_runner(model, batch, layout, 4, device)


def check(sequence: SingleSequenceRunner, backend: Watching) -> None:
    """Selections and outputs of the watched tokens against the oracles."""
    config = backend.config
    watched = tuple(position for position in WATCHED if position < sequence.length)
    slots = sequence.slots(sequence.length)
    layout, caches = config.cache_layout, sequence.runner.caches
    for layer, kind in enumerate(sequence.runner.model.config.indexer_types):
        trace = backend.layers[layer]
        assert tuple(trace.queries) == watched
        latents = read_latents(caches[2 * layer], slots, layout)
        for position in watched:
            selected = trace.selected[position]
            assert len(selected) == min(position + 1, config.index_topk)
            wanted = ref_attend(
                trace.queries[position],
                latents,
                selected.tolist(),
                config.softmax_scale,
                layout.kv_lora_rank,
            )
            found = backend.outputs[layer, position]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
        if kind == "shared":
            before = backend.layers[layer - 1]
            assert not trace.index_queries
            for position in watched:
                assert trace.selected[position].tolist() == before.selected[position].tolist()
            continue
        keys = read_index_keys(caches[2 * layer + 1], slots, layout)
        for position in watched:
            query, weights = trace.index_queries[position], trace.index_weights[position]
            scores = [ref_score(query, weights, key) for key in keys[: position + 1]]
            chosen = [p for p in ref_topk(scores, position + 1, config.index_topk) if p >= 0]
            assert trace.selected[position].tolist() == chosen
            ours = index_scores(query, weights, keys[: position + 1])
            assert exactness(trace.selected[position], ours, config.index_topk) == 1.0


CASES = [
    pytest.param(V32, "float32", id="v32-float32"),
    pytest.param(GLM, "bfloat16", id="glm-bfloat16"),
    pytest.param(FP8, "fp8_ds_mla", id="fp8"),
]


@pytest.mark.parametrize(("fields", "kv_cache_dtype"), CASES)
def test_what_is_recorded_is_what_the_layers_did(
    fields: dict[str, Any], kv_cache_dtype: str
) -> None:
    sequence, backend, _ = recorded(fields, kv_cache_dtype)
    check(sequence, backend)


def test_a_watched_run_gives_the_same_bits() -> None:
    sequence, _, watched = recorded(V32, "float32")
    own = run_all(sequence, TOKENS)
    assert not isinstance(sequence.runner.attn_backends[0], RecordingBackend)
    for left, right in zip(watched, own, strict=True):
        np.testing.assert_array_equal(left, right)


def test_watching_begins_anew() -> None:
    sequence = recorded(V32, "float32")[0]
    with recording(sequence.runner) as other:
        other.watch([7])
        run_all(sequence, TOKENS)
        assert [list(trace.queries) for trace in other.layers.values()] == [[7]] * 3
        other.watch([8])
        assert other.layers == {}


def test_a_step_of_two_rows_is_refused() -> None:
    runner = tiny_runner(tiny_model(V32))
    with recording(runner) as backend:
        backend.watch([0])
        runner.input_batch.begin_step()
        for row in range(2):
            runner.input_batch.add_row(row, [3, 4], 0, is_prefill=True)
        with pytest.raises(ValueError, match="one row, this one has 2"):
            runner.execute_model(np.array([1]))
