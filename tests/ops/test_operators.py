"""The public operators: Paddle tensors in and out, what they refuse, and one step through all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle tensors")

import paddle

import fd_dsa.ops as ops
from fd_dsa.errors import ShapeError
from fd_dsa.ops import providers
from tests.kernel_memory import open_memory
from tests.reference.indexer import ref_score
from tests.reference.sparse_mla import ref_attend

T, H, D, RANK, ROPE = 4, 2, 128, 512, 64


def zeros(*shape: int, dtype: str = "float32") -> Any:
    return paddle.zeros(list(shape), dtype)


def ints(*values: Any) -> Any:
    return paddle.to_tensor(np.array(values, np.int32))


def make_step() -> Any:
    """A prompt of three tokens after 66 others, and a row that decodes its 71st."""
    tables = ints([2, 0], [1, 3])
    return ops.step_metadata(
        ints(3, 0), ints(66, 70), ints(3, 1), tables, block_size=64, num_blocks=4
    )


def test_it_is_light_and_complete() -> None:
    code = "import fd_dsa.ops, sys; print(sum(m in sys.modules for m in ('paddle', 'triton')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
    assert all(getattr(ops, name).__doc__ for name in ops.__all__)
    with pytest.raises(AttributeError, match="no attribute 'paddle_jit'"):
        _ = ops.paddle_jit


def attention_inputs(fp8: bool) -> dict[str, Any]:
    """Activations of a layer in a step of four tokens, and empty caches."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, (T, ROPE // 2))
    arrays = {
        "kv_a": rng.normal(0, 1, (T, RANK + ROPE)),
        "index_k": rng.normal(0, 1, (T, D)),
        "q": rng.normal(0, 1, (T, H, D)),
        "weights": rng.normal(0, 1, (T, H)),
        "query": rng.normal(0, 1, (T, H, RANK + ROPE)),
        "cos_sin": np.concatenate([np.cos(angle), np.sin(angle)], axis=1),
    }
    tensors = {name: paddle.to_tensor(a.astype(np.float32)) for name, a in arrays.items()}
    widths = (656, 132, "uint8") if fp8 else (RANK + ROPE, D, "float32")
    tensors["latent"] = zeros(4, 1, 64, widths[0], dtype=widths[2])
    tensors["index"] = zeros(4, 64, widths[1], dtype=widths[2])
    return tensors


def run_layer(x: dict[str, Any], fp8: bool) -> list[Any]:
    """Scores, slots and results of the layer."""
    step = make_step()
    params = ops.CacheWriteParams("fp8_ds_mla" if fp8 else "float32")
    angles = None, step.slot_mapping, x["cos_sin"]
    ops.write_caches(x["kv_a"], x["index_k"], *angles, x["latent"], x["index"], params)
    q, weights = ops.indexer_query(x["q"], x["weights"], None, x["cos_sin"], quantized=fp8)
    logits = ops.indexer_logits(q, weights, x["index"], step)
    pages = {"batch_ids": step.batch_id_per_token, "block_tables": step.block_tables}
    lengths = step.position_ids + 1
    slots = ops.topk_indices(logits, lengths, 8, **pages, block_size=64, num_blocks=4)
    positions = ops.topk_indices(logits, lengths, 8)
    latents = ops.sparse_mla(x["query"], x["latent"], slots, softmax_scale=0.1)
    rows = x["latent"].reshape([256, -1])
    keys = ops.dequantize(rows, slots[0].astype("int64"))
    return [q, weights, logits, slots, positions, latents, keys]


@pytest.mark.triton
@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("fp8", [False, True])
def test_a_layer_by_kernels_and_by_numpy(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = attention_inputs(fp8)
    before = x["q"].numpy()
    host = run_layer(x, fp8)
    assert all(isinstance(result, paddle.Tensor) for result in host)
    np.testing.assert_array_equal(x["q"].numpy(), before)
    q, weights, logits, slots, positions, latents, keys = (result.numpy() for result in host)
    if not fp8:
        step = make_step()
        table, index = step.block_tables.numpy(), x["index"].numpy().reshape(256, D)
        for token, (row, position) in enumerate([(0, 66), (0, 67), (0, 68), (1, 70)]):
            own = table[row, np.arange(position + 1) // 64] * 64 + np.arange(position + 1) % 64
            expected = [ref_score(q[token], weights[token], index[slot]) for slot in own]
            np.testing.assert_allclose(logits[token, : position + 1], expected, atol=1e-4)
            assert (logits[token, position + 1 :] == -np.inf).all()
            assert slots[token].tolist() == own[positions[token]].tolist()
            cache, chosen = x["latent"].numpy().reshape(256, -1), slots[token].tolist()
            expected = ref_attend(x["query"].numpy()[token], cache, chosen, 0.1, RANK)
            np.testing.assert_allclose(latents[token], expected, atol=1e-5)
        np.testing.assert_array_equal(keys, cache[slots[0]])
    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    for module in ("topk", "logits", "mla", "query", "metadata"):
        monkeypatch.setattr(f"fd_dsa.ops.{module}.device_kind", lambda tensor: "gpu")
    monkeypatch.setattr("fd_dsa.ops.metadata.device_name", lambda tensor: "cpu")
    device = run_layer(attention_inputs(fp8), fp8)
    served = {operator: by["gpu"].provider for operator, by in providers.table().items()}
    assert served["indexer_logits"] == ("triton_tensor_core" if fp8 else "triton")
    assert {served[name] for name in ("topk", "cache_write", "indexer_query")} == {"triton"}
    for one, other in zip(host, device, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=pytest.mark.triton)])
def test_positions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fd_dsa.ops.positions.device_kind", lambda tensor: kind)
    out = paddle.full([7], -9, "int32")
    assert ops.position_ids(ints(3, 0, 0), ints(2, 4, 8), ints(3, 0, 2), out) is out
    assert out.tolist() == [2, 3, 4, 8, 9, -9, -9]
    assert ops.position_ids(ints(), ints(), ints(), out).tolist()[0] == 2


def test_metadata_in_the_buffers_of_a_builder() -> None:
    from fd_dsa.step import StepMetadataBuilder

    builder = StepMetadataBuilder(2, 8, 2, 64, 4)
    tables = ints([2, 0], [1, 3])
    inputs = ints(3, 0), ints(66, 70), ints(3, 1), tables
    step = ops.step_metadata(*inputs, block_size=64, out=builder)
    assert builder.num_builds == 1
    assert step.position_ids.tolist() == [66, 67, 68, 70]
    assert step.slot_mapping.tolist() == [2, 3, 4, 3 * 64 + 6]
    assert (step.max_seqlen_k, step.num_prefill_tokens) == (71, 3)


def test_keys_without_a_block_have_no_slot() -> None:
    tables = paddle.to_tensor(np.array([[3, 4, -1]], np.int32))
    pages = {"batch_ids": ints(0, -1), "block_tables": tables, "block_size": 2, "num_blocks": 4}
    logits = paddle.to_tensor(np.arange(16, dtype=np.float32).reshape(2, 8))
    slots = ops.topk_indices(logits, ints(8, 8), 8, **pages)
    assert slots.tolist() == [[6, 7, *[-1] * 6], [-1] * 8]


def test_results_are_written_where_they_are_asked_for() -> None:
    x, step = attention_inputs(False), make_step()
    out = paddle.full([T, 80], 5.0)
    assert ops.indexer_logits(x["q"], x["weights"], x["index"], step, out) is out
    assert (out[:, 71:] == 5.0).all() and (out[0, 67:71] == 5.0).all() and (out[0, :67] == 0).all()
    codes = zeros(T, H, D, dtype="uint8"), zeros(T, H)
    q = x["q"], x["weights"], None, x["cos_sin"]
    assert ops.indexer_query(*q, out=codes)[0] is codes[0]
    assert codes[0].numpy().any()
    for call, shape, dtype in (
        (lambda o: ops.topk_indices(zeros(T, 9), ints(9, 9, 0, 1), 2, out=o), (T, 2), "int32"),
        (lambda o: ops.dequantize(zeros(9, 16), paddle.arange(3), o), (3, 16), "float32"),
        (
            lambda o: ops.sparse_mla(
                zeros(T, H, 16),
                zeros(9, 16),
                zeros(T, 3, dtype="int32"),
                softmax_scale=1.0,
                kv_lora_rank=8,
                out=o,
            ),
            (T, H, 8),
            "float32",
        ),
    ):
        out = paddle.full(list(shape), 7, dtype)
        assert call(out) is out and not (out == 7).any()
        with pytest.raises(ShapeError, match=r"out of shape .* is not contiguous"):
            call(paddle.full([2 * n for n in shape], 7, dtype)[tuple(slice(n) for n in shape)])


PAGE = (Path(__file__).parents[2] / "docs/operators.md").read_text("utf-8")
EXAMPLES = [path.read_text("utf-8") for path in (Path(__file__).parents[2] / "examples").iterdir()]


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n != "CacheWriteParams"])
def test_the_page_and_an_example_have_the_operator(name: str) -> None:
    # tests/test_examples.py runs the examples
    assert f"\n| `{name}` | " in PAGE
    assert any(re.search(rf"\b{name}\(", text) for text in EXAMPLES)


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| (`[a-z_`, ]+) \| ([a-z_`, ]+) \| ([a-z_`, ]+) \|$", PAGE, re.M)
    told = {
        op: [cell.split(", ") for cell in cells] for ops_, *cells in rows for op in ops_.split(", ")
    }
    served = {
        f"`{op}`": [
            [f"`{p}`" for p in providers.available_providers(op, kind)] for kind in ("cpu", "gpu")
        ]
        for op in providers.OPERATORS
    }
    assert told == served


@pytest.mark.gpu_rig
def test_a_layer_on_a_device() -> None:
    m, x = open_memory("rig"), attention_inputs(True)
    host = run_layer(x, True)
    place = m.put(np.zeros(1, np.float32)).place
    device = {name: tensor.to(place) for name, tensor in attention_inputs(True).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.ops.test_operators.ints", lambda *v: m.put(np.array(v, np.int32)))
        results = run_layer(device, True)
    for one, other in zip(host, results, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-2, atol=1e-2)
