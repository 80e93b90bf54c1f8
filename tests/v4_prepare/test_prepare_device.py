"""Builders on a device: steps ahead of its work, and graphs that read their outputs.

The interpreter takes the same way with fewer and smaller steps; there nothing is ever late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fd_dsa.v4_prepare import (
    OUTPUT_SHAPES,
    V4PrepareConfig,
    V4PrepareError,
    csa_translate,
    v4_prepare_np,
)
from tests.v4_prepare.kernel_case import (
    CONFIGS,
    Step,
    expected,
    make_step,
    serving_config,
)
from tests.v4_prepare.places import Place, open_place

# of the device's clock: a tenth of a second
LONG = 200_000_000


@dataclass(frozen=True)
class Device:
    """Where builders run, and what keeps it busy.

    Attributes:
        place: how builders and arrays are made there.
        cfg: of the builders.
        num_steps: steps of a test.
    """

    place: Place
    cfg: V4PrepareConfig
    num_steps: int

    def random_step(self, rng: np.random.Generator, num_rows: int) -> Step:
        """Decode rows of any length with up to three drafts, idle ones among them."""
        longest = self.cfg.max_model_len
        rows = [(int(rng.integers(0, longest)), int(rng.integers(0, 5))) for _ in range(num_rows)]
        return make_step(self.cfg, rows, rng)

    def sleep(self, cycles: int) -> None:
        """Queue so many cycles of nothing."""

    def put_late(self, array: np.ndarray) -> Any:
        """A tensor that has its values when the work queued before is done."""
        return self.place.put(array)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work`, which has run before, as a graph: what replays it."""
        return work

    @contextmanager
    def busy(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Work that is queued inside the `with` block is not done before its end."""
        from fd_dsa.triton_runtime import transfers

        with monkeypatch.context() as patch:
            patch.setattr(transfers.Event, "done", lambda event: False)
            yield


class Gpu(Device):
    """A GPU, by torch."""

    def sleep(self, cycles: int) -> None:
        import torch

        torch.cuda._sleep(cycles)

    def put_late(self, array: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        import torch

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    @contextmanager
    def busy(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        import torch

        torch.cuda.synchronize()
        self.sleep(LONG)
        yield
        torch.cuda.synchronize()


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.triton),
        pytest.param("torch", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "torch":
        return Gpu(open_place("torch"), serving_config(8, 16_384, 3), num_steps=60)
    return Device(open_place("interpreter"), CONFIGS["decode"], num_steps=3)


def test_steps_ahead_of_a_busy_device(device: Device) -> None:
    cfg, rng = device.cfg, np.random.default_rng(1)
    prepare = device.place.prepare(cfg)
    queued = []
    for number in range(device.num_steps):
        step = device.random_step(rng, 1 + number % cfg.max_num_seqs)
        most = (step.ctx - step.q).clip(max=3)
        rejected = np.zeros(cfg.max_num_seqs, np.int32)
        rejected[: len(most)] = rng.integers(0, most + 1)
        prepare.stage(*step.arrays())
        # the sampler writes it late: after work that is queued and not done
        device.sleep(int(rng.integers(0, 400_000)))
        buffers = prepare.expand(device.put_late(rejected))
        copies = {name: getattr(buffers, name).clone() for name in OUTPUT_SHAPES(cfg)}
        queued.append((expected(cfg, step, rejected), copies))
    for wanted, copies in queued:
        for name, array in wanted.items():
            found = device.place.get(copies[name])
            np.testing.assert_array_equal(found[: len(array)], array, err_msg=name)
    prepare.poll_error()


def test_a_graph_translates_entries_of_the_step_before_its_replay(device: Device) -> None:
    cfg, place, rng = device.cfg, device.place, np.random.default_rng(2)
    prepare = place.prepare(cfg)
    topk = place.put(np.zeros((cfg.max_num_tokens, cfg.index_topk), np.int32))
    prepare.stage(*device.random_step(rng, 2).arrays())
    prepare.expand()
    rows = prepare.csa_translate(topk)
    replay = device.captured(lambda: prepare.csa_translate(topk))
    for number in range(device.num_steps):
        step = device.random_step(rng, 1 + number % cfg.max_num_seqs)
        prepare.stage(*step.arrays())
        prepare.expand()
        out = v4_prepare_np(cfg, *step.arrays())
        chosen = rng.integers(-1, cfg.max_model_len // cfg.csa_ratio, tuple(topk.shape), np.int32)
        topk.copy_(place.put(chosen), False)
        replay()
        wanted = csa_translate(out, step.table, chosen)
        np.testing.assert_array_equal(place.get(rows)[: len(wanted)], wanted)


@pytest.mark.gpu
def test_a_step_is_not_staged_in_a_capture() -> None:
    import torch

    cfg = CONFIGS["decode"]
    prepare = open_place("torch").prepare(cfg)
    step = make_step(cfg, [(20, 2), (9, 1)], np.random.default_rng(4))
    work = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        # an empty graph would be warned of
        work.add_(1)
        with pytest.raises(RuntimeError, match="graph capture"):
            prepare.stage(*step.arrays())
    prepare.stage(*step.arrays())
    assert prepare.expand().counts.tolist()[:2] == [2, 3]


def test_an_error_comes_when_its_step_has_run(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, rng = device.place, np.random.default_rng(3)
    prepare = place.prepare(device.cfg)
    step = device.random_step(rng, device.cfg.max_num_seqs)
    rows = np.flatnonzero(step.q)
    rollback = np.zeros(len(step.q), np.int32)
    rollback[rows] = -1
    rejected = place.put(rollback)
    with device.busy(monkeypatch):
        prepare.stage(*step.arrays())
        prepare.expand(rejected)
        prepare.poll_error()
    with pytest.raises(V4PrepareError) as caught:
        prepare.poll_error()
    assert str(caught.value) == f"v4_prepare: E_CTX: row {rows[0]}: rollback=-1 < 0"
