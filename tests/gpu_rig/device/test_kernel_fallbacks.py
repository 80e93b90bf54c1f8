"""The engine and the plug-in on a device whose compiler refuses a kernel that is only faster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.ops import providers
from fd_dsa.ops.indexer_projection.triton_kernel import project_indexer_kernel
from fd_dsa.ops.mla.prompt_kernel import attend_prompts_kernel, list_absorbed_kernel
from tests.broken_compiler import refusing_to_compile
from tests.gpu_rig import Rig
from tests.gpu_rig.device.test_demo_end_to_end import tiny_runner
from tests.gpu_rig.device.test_fastdeploy import SMALL, engine_on, small_jobs
from tests.gpu_rig.device.test_formats import BOUNDS, FP8, SIZES, WIDE_KEYS, folder_of, runner_on
from tests.gpu_rig.device.test_overlap import SecondStream
from tests.runner.tiny import V32, run_rows

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

TOKENS = np.random.default_rng(7).integers(2, 50, 30).tolist()
STEPS = [[(0, TOKENS[:6], 0, True)], [(0, TOKENS[6:7], 6, False)]]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of our log."""
    ours = (r for r in caplog.records if r.name.startswith("fd_dsa"))
    return [r.getMessage() for r in ours if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("forks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gemms_project_in_the_engine_without_a_fork(
    rig: Rig, forks: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", "64" if forks else "0")
    runner = tiny_runner(V32, "float32", rig.device)
    wanted = [run_rows(runner, rows).copy() for rows in STEPS]
    with (
        refusing_to_compile(project_indexer_kernel) as tried,
        caplog.at_level(logging.WARNING, logger="fd_dsa"),
    ):
        runner = tiny_runner(V32, "float32", rig.device)
        runner.attn_backends[0].overlap.side_stream = stream = SecondStream()
        found = [run_rows(runner, rows).copy() for rows in STEPS]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    # it is asked for once; the fork of that step is closed, and no other step forks
    assert tried == ["project_indexer_kernel"]
    assert stream.calls == (["begin", "end", "join"] if forks else [])
    (said,) = warnings_of(caplog)
    assert said.startswith("indexer_projection on ")
    assert ": gemm (a device, Paddle's GEMMs; " in said
    assert "not triton: kernel project_indexer_kernel" in said


def test_gemms_that_are_asked_for_do_not_fork(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_OVERLAP_MAX_TOKENS", "64")
    with providers.asking_for({"indexer_projection": "gemm"}):
        runner = tiny_runner(V32, "float32", rig.device)
        runner.attn_backends[0].overlap.side_stream = stream = SecondStream()
        run_rows(runner, STEPS[0])
    assert stream.calls == []


@pytest.mark.slow
def test_fastdeploys_gemms_project_in_the_plug_in(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    if rig.is_real:
        pytest.skip("the sizes are those of an interpreter")
    with engine_on(rig.device, "develop", **SMALL) as engine:
        wanted = engine.generate(small_jobs())
    with (
        refusing_to_compile(project_indexer_kernel) as tried,
        caplog.at_level(logging.WARNING, logger="fd_dsa"),
        engine_on(rig.device, "develop", **SMALL) as engine,
    ):
        assert engine.generate(small_jobs()) == wanted
        backend = engine.runner.attn_backends[0]
        assert not any(one.is_one_launch for one in backend.projections.values())
    assert tried == ["project_indexer_kernel"]
    assert [said for said in warnings_of(caplog) if "project_indexer_kernel" in said] != []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [attend_prompts_kernel, list_absorbed_kernel])
def test_prompts_attend_in_the_absorbed_form(
    rig: Rig, caplog: pytest.LogCaptureFixture, tmp_path: Path, kernel: Any
) -> None:
    fields: dict[str, Any] = V32 | SIZES | WIDE_KEYS | FP8
    runner = runner_on(folder_of(tmp_path / "model", fields, "fp8"), rig.device)
    assert runner.attn_backends[0].attention.dense_prompts is not None
    # a token that decodes attends in the absorbed form beside a prompt
    steps = [STEPS[0], [*STEPS[1], (1, TOKENS[:4], 0, True)]]
    wanted = [run_rows(runner, rows).copy() for rows in steps]
    with (
        refusing_to_compile(kernel) as tried,
        caplog.at_level(logging.WARNING, logger="fd_dsa"),
    ):
        runner = runner_on(tmp_path / "model", rig.device)
        found = [run_rows(runner, rows).copy() for rows in steps]
    assert tried == [kernel.__name__]
    for one, other in zip(found, wanted, strict=True):
        assert abs(one - other).max() <= BOUNDS["fp8"] * abs(other).max()
    (said,) = warnings_of(caplog)
    assert said.startswith(f"attention of prompts: absorbed from now on (kernel {kernel.__name__}")
