"""A small stack in Triton's interpreter: all sides compute the same, and the peers fit together."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
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
def stack(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inputs, weights and the backend of two layers."""
    from fd_dsa.ops import providers
    from fd_dsa.triton_runtime import INTERPRETING, device

    if not INTERPRETING:
        pytest.skip("kernels are compiled here, and torch's tensors are not on the GPU")
    # nothing that is registered or decided here is left to other tests
    monkeypatch.setattr(device, "_REGISTRY", {torch.Tensor: HostMemory()})
    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    monkeypatch.setattr(providers, "_choices", {})
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
    checked = plain_check(given, *found, backend.query_buffers(ROWS))
    assert checked["recall"] == 1 and checked["attention"] < 1e-2
    # a wrong choice is found
    wrong = plain_check(given, found[0].flip(0), *found[1:], backend.query_buffers(ROWS))
    assert wrong["recall"] < 1 and wrong["attention"] > 0.1

    Stack(*stack).step()
    wanted, steps = given.out.clone(), backend.builder.num_builds
    given.out.zero_()
    Everything(*stack).step()
    assert torch.equal(given.out, wanted) and wanted.abs().max() > 0
    assert backend.builder.num_builds == steps + 1


class Peers:
    """The operators of other projects, in torch; `schedules` counts those that FlashMLA made."""

    def __init__(self) -> None:
        self.written: list[torch.Tensor] = []
        self.schedules = 0

    def concat_and_cache_mla(self, latent: Any, k_pe: Any, cache: Any, slots: Any, *_: Any) -> None:
        assert latent.shape == (ROWS, 512) and k_pe.shape == (ROWS, 64)
        self.written.append(slots)

    def indexer_k_quant_and_cache(self, key: Any, cache: Any, slots: Any, *_: Any) -> None:
        assert key.shape == (ROWS, 128) and cache.shape[1:] == (64, 132)

    def __getitem__(self, grid: Any) -> Any:
        """vLLM's indexer query, without its rotation."""

        def launch(*arguments: Any, **_: Any) -> None:
            q, codes, weights, folded = (arguments[i] for i in (1, 6, 9, 12))
            codes.copy_(q.to(codes.dtype))
            folded.copy_(weights)

        return launch

    def schedule(self, lengths: Any) -> None:
        pass

    def score_pages(
        self, q: Any, index: Any, weights: Any, lengths: Any, tables: Any, *_: Any
    ) -> Any:
        found = []
        for token in range(ROWS):
            pages = index.view(len(index), -1)[tables[token].long()]
            keys = pages[:, : 64 * 128].reshape(-1, 128).view(torch.float8_e4m3fn).float()
            scales = pages[:, 64 * 128 :].contiguous().view(torch.float32).flatten()
            found.append((weights[token] @ (q[token].float() @ keys.T).relu()) * scales)
        return torch.stack(found)

    def sparse_decode_fwd(self, q: Any, pages: Any, slots: Any, *rest: Any) -> Any:
        from benchmarks._sparse_mla_sides import latents_of

        assert q.shape == (ROWS, 1, 64, 576) and not q[:, :, HEADS:].any()
        self.schedules += rest[2] is None
        out = torch.zeros(ROWS, 1, 64, 512, dtype=torch.bfloat16)
        for token in range(ROWS):
            rows = latents_of(pages.view(-1, 656)[slots[token, 0].long()])
            weights = torch.softmax(q[token, 0].double() @ rows.T * rest[8], 1)
            out[token, 0] = (weights @ rows[:, :512]).bfloat16()
        return out, None, torch.ones(1), torch.ones(1)


class TopK:
    """The exact ones."""

    def __init__(self, rows: int, width: int, k: int, peers: Any) -> None:
        self.out = torch.empty(rows, k, dtype=torch.int32)

    def exact(self) -> dict[str, Any]:
        def positions(scores: torch.Tensor) -> None:
            self.out.copy_(scores.topk(self.out.shape[1]).indices)

        return {"some": positions, "torch": positions}


def test_peers_fit_together(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import _peers, _stack_peers
    from benchmarks._stack import plain_check

    peers, given = Peers(), stack[0]
    monkeypatch.setattr(_peers, "vllm_cache_ops", lambda folder: peers)
    monkeypatch.setattr(_peers, "vllm_indexer_query", lambda folder: peers)
    monkeypatch.setattr(_peers, "flash_mla_builds", lambda folder: [("a build", peers, True)])
    monkeypatch.setattr(_peers, "deep_gemm", lambda folder: peers)
    monkeypatch.setattr(_stack_peers, "Sides", TopK)
    monkeypatch.setattr(_stack_peers, "fastest", lambda sides: next(iter(sides)))
    side = _stack_peers.PeerStack(*stack, None)
    assert side.made_by == {"top-k": "some", "attention": "a build"}
    checked = plain_check(given, *side.step(layers=1), side.queries)
    assert checked["recall"] > 0.99 and checked["attention"] < 1e-2
    peers.schedules, peers.written = 0, []
    given.out.zero_()
    side.step()
    assert peers.schedules == 1 and len(peers.written) == 2 and given.out.abs().max() > 0
    last = given.tables[:, (KEYS - 1) // 64].long() * 64 + (KEYS - 1) % 64
    assert torch.equal(peers.written[0], last)


def test_peers_that_are_not_there(stack: Any) -> None:
    from benchmarks._stack_peers import PeerStack

    with pytest.raises(LookupError, match="vLLM"):
        PeerStack(*stack, None)
