"""Kernels that cannot be compiled: what is only faster than something else ends no step."""

from __future__ import annotations

import logging
import re

import pytest

pytest.importorskip("paddle", reason="the steps are on Paddle's tensors")

from fd_dsa.errors import KernelUnavailable
from fd_dsa.ops import providers
from tests.attention.bfloat16_case import Bfloat16World
from tests.broken_compiler import refusing_to_compile
from tests.kernel_memory import open_memory
from tests.strategies import make_batch

pytestmark = pytest.mark.triton
# a decode row past the selection, and a prompt
ROWS = [(0, 70, 1), (2, 0, 2)]


def world() -> Bfloat16World:
    """A backend that scores and attends on tensor cores, in the interpreter."""
    return Bfloat16World(open_memory("interpreter"), make_batch(ROWS, 64), 16)


@pytest.mark.parametrize(
    ("operator", "module", "name"),
    [
        ("indexer_logits", "logits.tile_kernel", "tile_kernel"),
        ("indexer_logits", "logits.tile_schedule", "tile_schedule_kernel"),
        ("sparse_mla", "mla.tensor_core_kernel", "attend_kernel"),
    ],
)
def test_the_kernel_for_every_type_serves_instead(
    operator: str,
    module: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kernel = getattr(__import__(f"fd_dsa.ops.{module}", fromlist=[name]), name)
    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    caplog.set_level(logging.WARNING, logger="fd_dsa")
    with refusing_to_compile(kernel) as tried:
        backend = world()
        backend.step(backend.rows).check()
        # another backend does not try again
        another = world()
        another.step(another.rows).check()
        (choice,) = providers.table()[operator].values()
    assert tried == [name]
    (said,) = caplog.messages
    assert re.match(rf"{operator} on \w+: triton \(", said)
    assert f"not triton_tensor_core: kernel {name}: it cannot be compiled and loaded" in said
    assert said.endswith("PTXASError: ptxas died)")
    assert choice.provider == "triton"


def test_what_was_asked_for_and_the_last_provider_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fd_dsa.ops.logits.tile_kernel import tile_kernel
    from fd_dsa.ops.topk.triton_kernel import topk_kernel

    monkeypatch.setattr(providers, "device_kind", lambda tensor: "gpu")
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "indexer_logits=triton_tensor_core")
    with refusing_to_compile(tile_kernel):
        backend = world()
        with pytest.raises(KernelUnavailable, match="tile_kernel"):
            backend.step(backend.rows)
    monkeypatch.delenv("FD_DSA_OP_PROVIDER")
    with refusing_to_compile(topk_kernel):
        backend = world()
        with pytest.raises(KernelUnavailable, match="topk_kernel"):
            backend.step(backend.rows)
