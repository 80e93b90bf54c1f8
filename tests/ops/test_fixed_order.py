"""With FD_DSA_BATCH_INVARIANT=1 the bits of a token do not depend on what else a step holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fd_dsa.attention import step_plan
from fd_dsa.engine.batch import ScheduledBatch
from fd_dsa.engine.sampler import StepSampler
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.ops import fixed_order
from fd_dsa.ops import mla as attention
from fd_dsa.ops.logits import host_scores as scoring
from fd_dsa.runner.protocol import RunnerInfo
from tests.attention.harness import Sizes, rows_of, world_of
from tests.one_order import check_equal_bits
from tests.strategies import make_batch

ROOT = Path(__file__).parents[2]
# every logit of two prompts, read and answered by engines of many forms: all bits must be equal;
# a random clock gives chunks of other sizes
PROGRAM = """
import numpy as np
from tests.ops.fixed_order_engines import CLOCK, FORMS, PACED, logits_of
wanted, _ = logits_of({})
sequences = []
for form, clock in [*((form, None) for form in FORMS), (PACED, CLOCK)]:
    found, chunks = logits_of(form, clock)
    for one, other in zip(wanted, found, strict=True):
        assert len(one) == 6
        np.testing.assert_array_equal(one, other, err_msg=str((form, clock)))
    sequences.append(chunks)
assert len(set(sequences[-1])) > 3 and sequences[-1] not in sequences[:-1], sequences
print("equal")
"""


def test_logits_do_not_depend_on_chunks_company_or_batch() -> None:
    check_equal_bits(PROGRAM)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ways of one order in this process, whose library may keep none."""
    for module in (fixed_order, scoring, attention, step_plan):
        monkeypatch.setattr(module, "fixed_order", lambda: True)
    yield


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rows",
    [[(40, 0, 40), (3, 0, 3)], [(9, 30, 9), (0, 39, 1), (0, 2, 1)], [(0, 300, 1)]],
    ids=["prompts", "mixed", "decode"],
)
def test_the_ways_of_one_order_are_right(rows: list[tuple[int, int, int]], dtype: str) -> None:
    batch = make_batch(rows, 16)
    world = world_of(batch, Sizes(8, 16, dtype))
    world.check(rows_of(batch), world.run(rows_of(batch)))


def test_sums_over_keys_do_not_see_zeros_behind_them() -> None:
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3, 600), np.float32)
    values = rng.standard_normal((2, 600, 5)).astype(np.float32)
    for length in (1, 255, 256, 257, 600):
        shorter, wide = weights[..., :length], np.zeros_like(weights)
        wide[..., :length] = shorter
        np.testing.assert_array_equal(fixed_order.row_sums(shorter), fixed_order.row_sums(wide))
        found = fixed_order.weighted_sum(shorter, values[:, :length])
        np.testing.assert_allclose(found, shorter @ values[:, :length], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_library_whose_rows_differ_is_refused(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    def rows_agree(width: int, out: int, transpose_y: bool) -> bool:
        return (width, transpose_y) != (1024, transposed)

    monkeypatch.setattr(fixed_order, "fixed_order", lambda: True)
    monkeypatch.setattr(fixed_order, "rows_agree", rows_agree)
    with pytest.raises(ConfigError, match="FD_DSA_BATCH_INVARIANT: got 1, but on this machine"):
        fixed_order.check_fixed_order("cpu")


def test_a_library_without_its_strict_order_is_refused() -> None:
    """A process that has run a GEMM before the variable was set."""
    program = """
import os
os.environ.pop("MKL_CBWR", None)
import paddle
paddle.ones([8, 8]) @ paddle.ones([8, 8])
os.environ["FD_DSA_BATCH_INVARIANT"] = "1"
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from fd_dsa.ops.fixed_order import check_fixed_order, library_is_strict
if library_is_strict() is None:
    print("no MKL")
else:
    check_fixed_order("cpu")
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.stdout.strip() == "no MKL":
        pytest.skip("Paddle has no MKL here")
    assert "FD_DSA_BATCH_INVARIANT: got 1, but on this machine" in done.stderr


@pytest.mark.usefixtures("one_order")
def test_several_devices_are_refused() -> None:
    fixed_order.check_fixed_order("gpu:0")
    with pytest.raises(ConfigError, match="got 1 with --tensor-parallel-size 2 on gpu:0"):
        fixed_order.check_fixed_order("gpu:0", 2)


@pytest.mark.usefixtures("one_order")
def test_a_kernel_that_chooses_by_the_number_of_tokens_is_refused() -> None:
    pytest.importorskip("triton", reason="the kernels of a device")
    from fd_dsa.device.host_tensor import as_tensor
    from fd_dsa.ops.mla.tensor_core import select_attention
    from fd_dsa.ops.providers import TENSOR_CORE, asking_for

    sizes = "gpu", 64, "bfloat16", "fp8_ds_mla", 512, 64, 90, as_tensor
    with asking_for({}):
        assert select_attention(*sizes).provider == TENSOR_CORE
    refusal = "sparse_mla=custom_op cannot serve on gpu: FD_DSA_BATCH_INVARIANT=1 keeps one form"
    with (
        asking_for({"sparse_mla": "custom_op"}),
        pytest.raises(BackendUnavailable, match=refusal),
    ):
        select_attention(*sizes)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize(("temperature", "is_drawn"), [(0.0, True), (0.8, False)])
def test_a_device_draws_for_greedy_requests_alone(temperature: float, is_drawn: bool) -> None:
    queued: list[Any] = []
    runner = SimpleNamespace(
        set_parameters=lambda *given: None,
        vocab_size=32,
        enqueue_model=lambda rows, sampling: queued.append(sampling),
        sample=lambda: None,
    )
    runner.info = RunnerInfo(sampling=runner)
    sampler = StepSampler(runner, 2)
    requests: list[Any] = [
        Mock(
            rules=None,
            logprobs=None,
            params=SamplingParams(temperature=each),
            batch_row=batch_row,
            seq_id=batch_row,
            seed=0,
            num_output_tokens=3,
        )
        for batch_row, each in enumerate((0.0, temperature))
    ]
    batch = ScheduledBatch(requests, {}, sampling=requests, logits_indptr=range(3))
    batch.logits_indices = np.arange(2)
    assert sampler.enqueue(batch) == is_drawn == bool(queued)
