"""Where FastDeploy's own DSA path computes something else than the model: its numbers, and ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.fakes.trees import DEVELOP, TREES
from tests.reference.indexer import ref_layer_norm, ref_rms_norm
from tests.reference.rope import ref_rotate
from tests.reference.topk import ref_topk

from .demo_prompts import demo_prompts
from .side_by_side import (
    SIDES,
    Record,
    generate,
    make_engine,
    ours,
    prompt,
    record_choices,
    slots_of,
    upstream,
)

# engines by the dozen
pytestmark = pytest.mark.slow
CHUNK = 64


def _job(*args: Any, **kwargs: Any) -> Any:
    from tests.fakes.driver import Job

    return Job(*args, **kwargs)


def _chunked(num_tokens: int, chunk: int | None, **overrides: Any) -> list[int]:
    return generate(_job(prompt(num_tokens), 6, chunk=chunk), **overrides)[0]


@pytest.mark.parametrize("tree", ["pr7367", "develop"])
def test_later_chunks_see_the_earlier_ones(tree: str) -> None:
    """Upstream: models/deepseek_v3.py and flash_mla_sparse_fwd over this step's keys alone."""
    with upstream(TREES[tree]):
        whole = _chunked(100, None)
        cut = _chunked(100, CHUNK)
    with ours(TREES[tree]):
        assert _chunked(100, None) == whole
        assert _chunked(100, CHUNK) == whole
    assert cut != whole


def test_chunks_choose_among_all_keys() -> None:
    """With fewer keys chosen than there are, a chunk's tokens choose as in one piece."""
    with ours():
        whole = _chunked(100, None, index_topk=16)
        assert _chunked(100, CHUNK, index_topk=16) == whole


def test_a_cached_prefix_counts_as_seen() -> None:
    """The same weakness through a prefix hit: a row that begins with cached tokens."""

    def run() -> tuple[list[int], list[int]]:
        alone = _chunked(100, None)
        first = _job(prompt(100), 6)
        second = _job(prompt(100), 6, after=first)
        return alone, generate(first, second)[1]

    with upstream():
        alone, hit = run()
        assert hit != alone
    with ours():
        assert run() == (alone, alone)


def _second_chunk() -> Record:
    engine = make_engine()
    record = record_choices(engine)
    engine.generate([_job(prompt(100), 1, chunk=CHUNK)])
    return record


def test_a_later_chunk_is_no_decode_row() -> None:
    """Upstream: extract_decoder_token_from_q looks at `seq_lens_decoder > 0` alone."""
    with upstream():
        found = _second_chunk().of(1)
        # the first token has slots of the cache, the others places among this step's keys
        assert found.chosen(0) == slots_of(found.tables[0], CHUNK + 1)
        assert [found.chosen(t) for t in (1, 35)] == [[0, 1], list(range(36))]
    with ours():
        found = _second_chunk().of(1)
        for token in range(100 - CHUNK):
            assert found.chosen(token) == slots_of(found.tables[0], CHUNK + token + 1)


def _with_drafts() -> tuple[Record, list[list[int]]]:
    engine = make_engine(method="ngram", num_speculative_tokens=2)
    record = record_choices(engine)
    # wrong drafts, so that each step accepts one token
    output = engine.generate([_job(prompt(20), 4, drafts=lambda tokens: [5, 6])])
    return record, output


def test_every_draft_token_of_a_row_gets_its_keys() -> None:
    """Upstream: one token of a decode row is extracted, with `seq_lens_decoder + 1` keys."""
    with upstream():
        found = _with_drafts()[0].of(1)
        assert found.chosen(0) == slots_of(found.tables[0], 21)
        assert found.chosen(1) == found.chosen(2) == []
    with ours():
        record, output = _with_drafts()
        found = record.of(1)
        for draft in range(3):
            assert found.chosen(draft) == slots_of(found.tables[0], 21 + draft)
        assert output == generate(_job(prompt(20), 4))


def _index_keys() -> tuple[np.ndarray, dict[tuple[str, str], np.ndarray]]:
    """Layer 0's keys of a prompt from its cache, and the ways in which they may be meant."""
    engine = make_engine()
    record = record_choices(engine)
    engine.generate([_job(prompt(10), 1)])
    found = record.of(0)
    from fastdeploy._fp8 import decode, index_planes

    codes, scales = index_planes(found.keys)
    slots = np.arange(10)
    block = found.tables[0][0]
    keys = decode(codes[block, slots]) * scales[block, slots][:, None]
    attention = engine.runner.model.model.layers[0].self_attn
    projected = found.hidden @ attention.indexer.wk.weight.numpy()
    return keys, {
        (norm, pairing): np.stack(
            [_meant(row, t, norm, pairing, attention) for t, row in enumerate(projected)]
        )
        for norm in ("layer", "rms")
        for pairing in ("halves", "neighbours")
    }


def _meant(row: np.ndarray, position: int, norm: str, pairing: str, attention: Any) -> np.ndarray:
    weight, bias = _checkpoint("k_norm.weight"), _checkpoint("k_norm.bias")
    normed = ref_layer_norm(row, weight, bias, 1e-6) if norm == "layer" else None
    if normed is None:
        normed = ref_rms_norm(row, weight, 1e-6)
    table = attention.indexer_rotary_emb.cos_sin_cache.numpy()[position]
    angles = np.arctan2(table[32:], table[:32])
    rotated = ref_rotate(normed[:64], angles, interleaved=pairing == "neighbours")
    return np.concatenate([rotated, normed[64:]])


def _checkpoint(name: str) -> np.ndarray:
    from fastdeploy.worker.checkpoint import read_checkpoint

    from fd_dsa.config import demo_model_path

    wanted = f"model.layers.0.self_attn.indexer.{name}"
    return next(array for found, array in read_checkpoint(demo_model_path()) if found == wanted)


def _closest(keys: np.ndarray, meanings: dict[tuple[str, str], np.ndarray]) -> tuple[str, str]:
    """What the keys are; the others are much further away than e4m3 rounds."""
    distance = {
        name: np.linalg.norm(keys - meant) / np.linalg.norm(meant)
        for name, meant in meanings.items()
    }
    first, second = sorted(distance, key=lambda name: distance[name])[:2]
    assert distance[first] < 0.05 < distance[second]
    return first


def test_the_indexer_s_rotation_pairs_halves_for_deepseek() -> None:
    """Upstream: layers/rotary_embedding.py has `is_neox=False` for the indexer too."""
    with upstream():
        assert _closest(*_index_keys()) == ("layer", "neighbours")
    with ours():
        assert _closest(*_index_keys()) == ("layer", "halves")
    # for comparisons
    with ours(FD_DSA_INDEXER_ROPE_INTERLEAVE="1"):
        assert _closest(*_index_keys()) == ("layer", "neighbours")


def _first_positions(**overrides: Any) -> list[list[int]]:
    """Positions that layer 0 chooses for each token of a prompt in one piece."""
    engine = make_engine(**overrides)
    record = record_choices(engine)
    engine.generate([_job(prompt(60), 1)])
    # one block: a slot's offset is its position, as is a place among the step's keys
    return [sorted(index % 64 for index in record.of(0).chosen(token)) for token in range(60)]


def test_with_upstream_s_rotation_the_selection_is_upstream_s() -> None:
    """The switch for comparisons: 12 of up to 60 keys, in their scores the same to the bit."""
    with upstream():
        theirs = _first_positions(index_topk=12)
    with ours(FD_DSA_INDEXER_ROPE_INTERLEAVE="1"):
        assert _first_positions(index_topk=12) == theirs
    with ours():
        assert _first_positions(index_topk=12) != theirs


def _choices_among_equals() -> np.ndarray:
    """Layer 0's selection of 8 keys for the last tokens of a prompt, all scores being 0."""
    engine = make_engine(index_topk=8)
    for layer in engine.runner.model.model.layers:
        weight = layer.self_attn.indexer.weights_proj.weight
        weight.copy_(weight * 0, False)
    record = record_choices(engine)
    engine.generate([_job(prompt(40), 1)])
    return record.of(0).indices[20:]


def test_equal_scores_are_decided_by_position() -> None:
    """Upstream: the order of atomics in sparse_indexer/indexer_topk.cuh decides."""
    with upstream():
        first = _choices_among_equals()
    with upstream():
        # another run of the process has launched other kernels before
        generate(_job(prompt(10), 2), index_topk=8)
        second = _choices_among_equals()
        assert not np.array_equal(np.sort(first), np.sort(second))
    with ours():
        first, second = _choices_among_equals(), _choices_among_equals()
        assert np.array_equal(first, second)
        expected = ref_topk([0.0] * 40, 40, 8)
        assert (first % 64 == expected).all() and len(set((first // 64).ravel())) == 1


def _backend(**model: Any) -> Any:
    import fastdeploy.model_executor.models  # noqa: F401 - runs the plug-ins
    from fastdeploy.config import fd_config
    from fastdeploy.model_executor.layers.attention import get_attention_backend

    from fd_dsa.config import demo_model_path

    config = fd_config(demo_model_path(), **model)
    return get_attention_backend()(
        config,
        kv_num_heads=1,
        num_heads=8,
        head_dim=64,
        encoder_block_shape_q=64,
        decoder_block_shape_q=16,
    )


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, None], ids=["no_factor", "none"])
def test_a_rope_scaling_needs_no_factor(scaling: dict[str, str] | None) -> None:
    """Upstream: the constructor in dsa_attention_backend.py reads `rope_scaling["factor"]`."""
    sizes = {"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rope_scaling": scaling}
    with upstream():
        if scaling is None:
            assert _backend(**sizes).attn_softmax_scale == 256**-0.5
        else:
            with pytest.raises(KeyError, match="factor"):
                _backend(**sizes)
    with ours():
        assert _backend(**sizes).attn_softmax_scale == 256**-0.5


def test_the_softmax_scale_has_yarn_s_square_on_both_sides() -> None:
    sizes = {"qk_nope_head_dim": 128, "rope_scaling": {"factor": 40, "mscale_all_dim": 1.0}}
    for side in SIDES.values():
        with side():
            assert abs(_backend(**sizes).attn_softmax_scale - 0.1352337789) < 1e-9


def test_new_deep_gemm_refuses_upstream_s_lengths() -> None:
    """Upstream: models/deepseek_v3.py passes lengths [rows] and `clean_logits=True`."""
    newest, fact = replace(DEVELOP, deep_gemm="2026"), demo_prompts()["fact"]
    # sure of its answer, which random tokens are not: both sides round differently
    with upstream(newest), pytest.raises(RuntimeError, match="context_lens"):
        generate(_job(fact.token_ids, 3))
    with ours(newest):
        assert generate(_job(fact.token_ids, 3)) == [fact.answer[:3]]
    with upstream():
        assert generate(_job(fact.token_ids, 3)) == [fact.answer[:3]]
