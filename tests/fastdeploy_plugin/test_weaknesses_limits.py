"""What FastDeploy's own DSA path cannot run, or runs only with features switched off; and ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.errors import ConfigError
from tests.fakes.trees import TREES
from tests.reference.sparse_mla import ref_attend

from .side_by_side import NUM_LAYERS, generate, launches, make_engine, ours, prompt, upstream

GRAPHS = {"use_cudagraph": True, "cudagraph_capture_sizes": [4, 2, 1]}


def _jobs() -> list[Any]:
    """Three rows that decode together for a while: a graph of four tokens has one too many."""
    from tests.fakes.driver import Job

    return [Job(prompt(length, seed), 6) for seed, length in enumerate((20, 30, 40))]


def test_mtp_is_refused_with_the_reason() -> None:
    """Upstream: spec_decode/mtp.py unpacks two shapes of the three."""
    drafts = {"method": "mtp", "num_speculative_tokens": 1}
    with upstream(TREES["pr7367"]), pytest.raises(ValueError, match="too many values to unpack"):
        make_engine(**drafts)
    with ours(), pytest.raises(ConfigError, match=r"proposer.*mtp\.py.*--speculative-config"):
        make_engine(**drafts)


def _prepared(num_rows: int, num_launched: int | None = None) -> Any:
    """ForwardMeta of a step of decode rows, one token each, prepared by the tree's backend."""
    num_launched = num_launched or num_rows
    import fastdeploy.model_executor.models  # noqa: F401 - runs the plug-ins
    from fastdeploy.config import fd_config
    from fastdeploy.model_executor.forward_meta import ForwardMeta
    from fastdeploy.model_executor.layers.attention import get_attention_backend
    from fastdeploy.model_executor.ops import gpu

    config = fd_config(demo_model_path(), max_num_seqs=num_rows, max_model_len=128)
    backend = get_attention_backend()(config, kv_num_heads=1, num_heads=8, head_dim=48)
    rows = np.arange(num_rows)
    arrays = {
        "seq_lens_encoder": 0 * rows,
        "seq_lens_decoder": rows % 100,
        "seq_lens_this_time": 0 * rows + 1,
        "block_tables": np.stack([2 * rows, 2 * rows + 1], axis=1),
        "batch_id_per_token": np.pad(rows, (0, num_launched - num_rows), constant_values=-1),
        "cu_seqlens_q": np.arange(num_rows + 1),
    }
    meta = ForwardMeta(
        paddle.zeros([num_launched], "int64"),
        attn_backend=backend,
        max_len_tensor_cpu=paddle.zeros([6], "int32"),
        **{name: paddle.to_tensor(values.astype(np.int32)) for name, values in arrays.items()},
    )
    backend.init_attention_metadata(meta)
    if getattr(meta, "fd_dsa_step", None) is None:
        meta.position_ids, meta.slot_mapping = (paddle.zeros([num_rows], "int64") for _ in "ps")
        lengths = meta.seq_lens_encoder, meta.seq_lens_decoder, meta.seq_lens_this_time
        rest = meta.batch_id_per_token, meta.block_tables, meta.position_ids, meta.slot_mapping
        gpu.get_position_ids_and_slot_mapping(*lengths, *rest, 64)
    return meta


def test_a_step_may_have_more_rows_than_a_block_has_threads() -> None:
    """Upstream: one thread a row in get_position_ids*.cu, and one block."""
    rows = np.arange(1500)
    slots = (2 * rows + rows % 100 // 64) * 64 + rows % 100 % 64
    with upstream(TREES["fused"]):
        meta = _prepared(1000)
        assert np.array_equal(meta.slot_mapping.numpy(), slots[:1000])
        with pytest.raises(RuntimeError, match="1500 rows"):
            _prepared(1500)
    with ours():
        meta = _prepared(1500)
        assert np.array_equal(meta.position_ids.numpy(), rows % 100)
        assert np.array_equal(meta.slot_mapping.numpy(), slots)


def test_padding_is_no_row_s_slot() -> None:
    """Upstream: #7367's formula takes the last row for a batch id of -1."""

    tables = paddle.to_tensor([[1, -1], [3, -1]], dtype="int32")
    with upstream(TREES["pr7367"]):
        from fastdeploy.worker._runner_step import compute_slot_mapping

        batch_ids = paddle.to_tensor([0, 1, -1, -1], dtype="int32")
        stale = paddle.to_tensor([7, 9, 5, 64], dtype="int32")
        slots = compute_slot_mapping(tables, stale, batch_ids, 64)
        # one in a live block of the second row, one before the cache
        assert slots.tolist() == [64 + 7, 192 + 9, 192 + 5, -64]
    with ours(TREES["pr7367"]):
        meta = _prepared(2, num_launched=4)
        assert meta.slot_mapping.tolist() == [0, 129, -1, -1]
        assert meta.position_ids.tolist() == [0, 1, 0, 0]


def _latents_after_decoding(**graphs: Any) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """The last layer's latents when three rows have decoded together, of what slots, and tokens."""
    from fastdeploy._fp8 import latent_values

    engine = make_engine(**graphs)
    jobs = _jobs()
    waiting = list(jobs)
    for _ in range(4):
        engine.step(waiting)
    if graphs:
        assert engine.runner.model.model.graph_opt_backend.cudagraphs.num_replays == {4: 3}
    # each has one block
    slots = np.concatenate(
        [job.blocks[0] * 64 + np.arange(len(job.prompt) + 3) for job in jobs],
    )
    cache = engine.runner.share_inputs["caches"][2 * (NUM_LAYERS - 1)]
    latents = latent_values(cache.numpy().reshape(-1, 656)[slots])
    return latents, slots, [job.output for job in jobs]


def _changed(eager: np.ndarray, graph: np.ndarray) -> np.ndarray:
    """Rows that differ by more than sums in another order do."""
    return np.flatnonzero(
        np.linalg.norm(eager - graph, axis=1) > 0.1 * np.linalg.norm(eager, axis=1)
    )


@pytest.mark.slow
def test_a_padded_graph_writes_nothing_but_its_rows() -> None:
    """Upstream: its buffer keeps slots of longer steps past the tokens of this one."""
    with upstream():
        eager, slots, _ = _latents_after_decoding()
        graph, _, _ = _latents_after_decoding(**GRAPHS)
        # the fourth token of the step before was the first row's at position 3
        assert slots[_changed(eager, graph)].tolist() == [slots[0] + 3]
    with ours():
        eager, _, tokens = _latents_after_decoding()
        graph, _, padded_tokens = _latents_after_decoding(**GRAPHS)
        assert len(_changed(eager, graph)) == 0 and padded_tokens == tokens


def _attend(num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode attention of a backend with so many heads, and softmax over the same keys."""
    import fastdeploy.model_executor.models  # noqa: F401 - runs the plug-ins
    from fastdeploy._fp8 import latent_values
    from fastdeploy.config import fd_config
    from fastdeploy.model_executor.forward_meta import ForwardMeta
    from fastdeploy.model_executor.layers.attention import Attention, get_attention_backend

    config = fd_config(demo_model_path(), max_model_len=128)
    backend = get_attention_backend()(config, kv_num_heads=1, num_heads=num_heads, head_dim=48)
    random = np.random.default_rng(num_heads)
    cache = random.integers(0, 60, (3, 1, 64, 656)).astype(np.uint8)
    cache[..., 512:528] = np.float32([0.1] * 4).view(np.uint8)
    int32 = {
        "seq_lens_encoder": [0, 0],
        "seq_lens_decoder": [70, 3],
        "seq_lens_this_time": [1, 1],
        "block_tables": [[2, 0], [1, -1]],
        "batch_id_per_token": [0, 1],
        "cu_seqlens_q": [0, 1, 2],
    }
    meta = ForwardMeta(
        paddle.zeros([2], "int64"),
        attn_backend=backend,
        max_len_tensor_cpu=paddle.zeros([6], "int32"),
        caches=[paddle.to_tensor(cache), paddle.zeros([3, 64, 132], "uint8")],
        **{name: paddle.to_tensor(np.int32(values)) for name, values in int32.items()},
    )
    backend.init_attention_metadata(meta)
    meta.slot_mapping = paddle.to_tensor([6, 67])
    normal = [
        random.standard_normal(shape).astype(np.float32)
        for shape in ((2, num_heads, 576), (2, 512), (2, 1, 64))
    ]
    q, compressed_kv, k_pe = (paddle.to_tensor(values) for values in normal)
    chosen = [[128, 190, 6, -1], [64, 67, -1, -1]]
    layer = Attention(config, layer_id=0)
    k = paddle.concat([compressed_kv, k_pe.squeeze(1)], axis=-1).unsqueeze(1)
    indices = paddle.to_tensor(np.int32(chosen)).unsqueeze(1)
    out = layer(q, k, indices, None, compressed_kv, k_pe, meta)
    values = latent_values(meta.caches[0].numpy().reshape(-1, 656))
    expected = [
        ref_attend(normal[0][t], values, [s for s in chosen[t] if s >= 0], 128**-0.5, 512)
        for t in range(2)
    ]
    return out.reshape([2, num_heads, 512]).numpy(), np.stack(expected)


@pytest.mark.parametrize("num_heads", [128, 64, 32, 16])
def test_any_number_of_heads_a_rank(num_heads: int) -> None:
    """Upstream in April: FlashMLA takes 64 or 128; four and eight ranks have fewer."""
    with ours():
        out, expected = _attend(num_heads)
        assert np.allclose(out, expected, atol=1e-4)
    with upstream(TREES["pr7367"], any_heads=False):
        if num_heads >= 64:
            assert np.allclose(*_attend(num_heads), atol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="Unsupported h_q"):
                _attend(num_heads)


def _everything(**features: Any) -> list[list[int]]:
    from tests.fakes.driver import Job

    first = Job(prompt(150), 6, chunk=64)
    jobs = [first, Job(prompt(150)[:130] + prompt(9, 7), 6, after=first), Job(prompt(20, 3), 12)]
    return make_engine(**features).generate(jobs)


@pytest.mark.slow
def test_all_features_together() -> None:
    """Upstream: its recipe turns graphs, prefix hits, chunks and the overlap schedule off."""
    from tests.fakes.driver import Job

    features = {**GRAPHS, "enable_overlap_schedule": True}
    plain = {"max_num_batched_tokens": 256}
    with ours():
        alone = [
            generate(Job(tokens, count), **plain)[0]
            for tokens, count in (
                (prompt(150), 6),
                (prompt(150)[:130] + prompt(9, 7), 6),
                (prompt(20, 3), 12),
            )
        ]
        assert _everything(**features) == alone
        assert launches("graph")
    with upstream():
        assert _everything(**features) != alone
