"""The layers on a device: our kernels, in Triton's interpreter, where a GPU would run them.

Paddle's CPU tensors stand for device memory: every question where a tensor is gets a device as its
answer. What Paddle's CPU build cannot compute in bfloat16 is computed in float32 and rounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.environment import choose_triton_mode
from fd_dsa.fastdeploy_plugin import backend as backend_module
from fd_dsa.ops import _host, providers
from tests.fastdeploy_plugin.layers import Rows, hidden_states, make_backend, make_layer
from tests.fastdeploy_plugin.steps import config, registered, values

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not choose_triton_mode(), reason="CPU tensors need the interpreter"),
]
# a first chunk, then decoding beside a chunk with cached tokens; one launched token too many each
STEPS = [[(3, 0, 3)], [(0, 3, 1), (2, 64, 2)]]
SIZES = {
    "max_num_batched_tokens": 8,
    "max_num_seqs": 2,
    "cudagraph_capture_sizes": [2, 1],
    "cudagraph_capture_sizes_prefill": [],
}


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor is on a device."""
    real, core, active = _host.on_device, backend_module.CoreBackend, [True]

    def everywhere(array: Any) -> bool:
        # modules that are imported meanwhile keep this function
        return not isinstance(array, np.ndarray) if active else real(array)

    def on_device(*given: Any) -> Any:
        return core(*given, lambda shape, dtype: paddle.zeros(list(shape), dtype))

    for name, module in list(sys.modules.items()):
        if name.startswith("fd_dsa.") and getattr(module, "on_device", None) is real:
            monkeypatch.setattr(module, "on_device", everywhere)
    monkeypatch.setattr(providers, "_choices", {})
    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    monkeypatch.setattr(backend_module, "device_name", lambda tensor: "gpu:0")
    monkeypatch.setattr(backend_module, "CoreBackend", on_device)
    yield
    active.clear()


def run(backend: Any, layer: Any, dtype: str = "float32") -> tuple[list[np.ndarray], Any]:
    """Outputs of the steps, and the caches after them."""
    rows, outputs = Rows(backend), []
    for number, lengths in enumerate(STEPS):
        count = sum(now for _, _, now in lengths)
        hidden = hidden_states(count + 1, number).astype(dtype)
        with paddle.no_grad():
            out = layer(rows.step(lengths, count + 1), hidden)
        assert str(out.dtype) == f"paddle.{dtype}"
        outputs.append(np.array(out.astype("float32"))[:count])
    return outputs, [np.array(cache) for cache in rows.caches]


def rounded_to_bfloat16(layer: Any) -> None:
    """A layer of a bfloat16 model, whose GEMMs and norms Paddle's CPU build has in float32."""
    for name, sublayer in layer.named_sublayers():
        if not list(sublayer.parameters(include_sublayers=False)) or name == "kv_b_proj":
            continue
        inner = sublayer.forward

        def forward(x: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            out = _inner(x.astype("float32"), **kwargs)
            both = out if isinstance(out, tuple) else (out,)
            low = tuple(one.astype("bfloat16") for one in both)
            return low if isinstance(out, tuple) else low[0]

        sublayer.forward = forward
    # what our operators read themselves
    for owner, name in (
        (layer.indexer.wk, "weight"),
        (layer.indexer.weights_proj, "weight"),
        (layer.indexer.k_norm, "weight"),
        (layer.indexer.k_norm, "bias"),
        (layer.kv_a_layernorm, "weight"),
        (layer.rotary_emb, "cos_sin_cache"),
        (layer.indexer_rotary_emb, "cos_sin_cache"),
    ):
        low = getattr(owner, name).astype("bfloat16")
        delattr(owner, name)
        setattr(owner, name, low)


def test_a_layer_gives_what_the_cpu_gives(request: pytest.FixtureRequest) -> None:
    with registered():
        expected, caches = run(make_backend(config(**SIZES)), make_layer())
        request.getfixturevalue("on_a_device")
        backend = make_backend(config(**SIZES))
        found, written = run(backend, make_layer())
        assert type(backend.core.attention).__name__ == "DeviceAttention"
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(written, caches, strict=True):
        assert (ours == theirs).mean() > 0.9999


def test_a_bfloat16_layer_is_near_the_float32_one(request: pytest.FixtureRequest) -> None:
    with registered():
        expected, _ = run(make_backend(config(**SIZES)), make_layer())
        request.getfixturevalue("on_a_device")
        layer, backend = make_layer(), make_backend(config(**SIZES))
        rounded_to_bfloat16(layer)
        backend.config = replace(backend.config, dtype="bfloat16")
        found, _ = run(backend, layer, "bfloat16")
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


@pytest.mark.usefixtures("on_a_device")
def test_what_the_host_knows_bounds_a_step() -> None:
    with registered():
        backend = make_backend(config(**SIZES))
        rows = Rows(backend)
        meta = rows.step(STEPS[0], 6)
        step = meta.fd_dsa_step
        # without the runner's word every token may be of a prompt
        assert step.num_prefill_tokens == 6
        assert step.max_seqlen_k == 256
        assert values(meta.slot_mapping)[3:] == [-1] * 3
        backend.set_step_hints(False)
        meta = rows.step([(0, 3, 1), (0, 5, 1)], 2)
        assert meta.indexer_attn_mask_offsets is None
        assert meta.fd_dsa_step.num_prefill_tokens == 0


@pytest.mark.usefixtures("on_a_device")
def test_what_a_graph_would_keep_does_not_move() -> None:
    """Same addresses in every step: positions, slots, windows, queries, and kept weights."""
    with registered():
        backend = make_backend(config(**SIZES))
        rows, layer = Rows(backend), make_layer()
        addresses = []
        for lengths in (STEPS[0], STEPS[1], STEPS[0]):
            meta = rows.step(lengths)
            count = meta.fd_dsa_step.position_ids.shape[0]
            with paddle.no_grad():
                layer(meta, hidden_states(count))
            core = backend.core
            kept = [
                meta.position_ids,
                meta.slot_mapping,
                meta.indexer_attn_mask_offsets,
                core.attention.mla_query_buffer(count),
                *core.attention.query_buffers(count),
                *core.attention.projection_buffers(count),
                backend.norms_of(0, layer.kv_a_layernorm, layer.indexer).kv_norm_weight,
                backend.cos_sin_of(layer.rotary_emb),
            ]
            addresses.append([tensor.data_ptr() for tensor in kept])
    assert addresses[0] == addresses[1] == addresses[2]
