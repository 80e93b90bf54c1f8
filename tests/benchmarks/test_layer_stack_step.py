"""A small stack in Triton's interpreter: all sides compute the same, and the peers fit together."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.triton

ROWS, KEYS, HEADS, TOPK = 2, 192, 16, 128


class HostMemory:
    """Torch tensors on a CPU, as the launcher of an interpreting process takes them."""

    def device_of(self, tensor: Any) -> int:
        return 0

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, fresh_choices: None) -> Any:
    """Inputs, weights and the backend of two layers."""
    torch = pytest.importorskip("torch")
    from fd_dsa.ops import providers
    from fd_dsa.triton_runtime import INTERPRETING, device_api

    if not INTERPRETING:
        pytest.skip("kernels are compiled here, and torch's tensors are not on the GPU")
    # nothing that is registered or decided here is left to other tests
    monkeypatch.setattr(device_api, "DEVICE_APIS", {torch.Tensor: HostMemory()})
    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    from benchmarks import _gpu, _layer, _logits_sides, _sparse_mla_sides, _stack
    from benchmarks._layer import Sizes
    from benchmarks._logits_sides import Shape

    for module in (_logits_sides, _sparse_mla_sides):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    for module in (_layer, _stack):
        monkeypatch.setattr(module, "LAYERS", 2)
    monkeypatch.setattr(_gpu, "num_sets", lambda num_bytes: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.manual_seed(0)
    rows = {"max_rows": ROWS, "max_tokens": ROWS, "context": KEYS, "topk": TOPK}
    sizes = Sizes(hidden=64, q_rank=64, heads=HEADS, index_heads=16, **rows)
    shape = Shape(HEADS, ROWS, KEYS)
    given = _layer.Given(shape, sizes, _layer.Pool(3 * shape.num_pages), "cpu")
    return given, _layer.weights_of(sizes, "cpu"), _layer.backend_of(sizes, "cpu")


def test_sides_give_the_same_bytes(stack: Any) -> None:
    from benchmarks._stack import Everything, PackageAlone, Stack, plain_check

    given, _, backend = stack
    found = PackageAlone(*stack).step(layers=1)
    checked = plain_check(given, *found, backend.attention.query_buffers(ROWS))
    assert checked["recall"] == 1 and checked["attention"] < 1e-2
    # a wrong choice is found
    wrong = plain_check(given, found[0].flip(0), *found[1:], backend.attention.query_buffers(ROWS))
    assert wrong["recall"] < 1 and wrong["attention"] > 0.1

    Stack(*stack).step()
    wanted, steps = given.out.clone(), backend.builder.num_builds
    given.out.zero_()
    Everything(*stack).step()
    assert given.out.equal(wanted) and wanted.abs().max() > 0
    assert backend.builder.num_builds == steps + 1


def test_peers_that_are_not_there(stack: Any) -> None:
    from benchmarks._stack_peers import PeerStack

    with pytest.raises(LookupError, match="vLLM"):
        PeerStack(*stack, None)
