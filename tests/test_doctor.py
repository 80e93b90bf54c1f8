"""The doctor finds what is wrong, says it in a line, and its exit status tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import doctor
from fd_dsa.cli import main as fd_dsa
from fd_dsa.doctor import environment, self_check
from fd_dsa.doctor.self_check import CHECKS, CheckFailed, Memory
from fd_dsa.triton_runtime import INTERPRETING

ROOT = Path(__file__).resolve().parent.parent
# output -> where a wrong value has to be found: the first one, or one that only some rows have
TAMPERED = [
    ("step_metadata", "slot_mapping", 2),
    ("step_metadata", "position_ids", 0),
    ("step_metadata", "indexer_attn_mask_offsets", 5),
    ("step_metadata", "cache_seqlens", 1),
    ("cache_write", "latent", 70 * 656 + 3),
    ("cache_write", "latent", 70 * 656 + 515),
    ("cache_write", "latent", 70 * 656 + 531),
    ("cache_write", "latent", 656),
    ("cache_write", "index", 128),
    ("cache_write", "index", 0),
    ("cache_write", "index", 64 * 128 + 3),
    ("indexer_query", "codes", 0),
    ("indexer_query", "folded", 0),
    ("indexer_gather", "keys", 0),
    ("indexer_gather", "keys", 70 * 128),
    ("indexer_gather", "scales", 99),
    ("topk", "best", 8),
]


@pytest.fixture(scope="module")
def right() -> dict[str, dict[str, np.ndarray]]:
    """What every operator gives on the CPU."""
    return {name: run(Memory("cpu")) for name, (run, _, _) in CHECKS.items()}


@pytest.mark.parametrize(("name", "output", "place"), TAMPERED)
def test_a_wrong_value_is_found(right: Any, name: str, output: str, place: int) -> None:
    is_right = CHECKS[name][1]
    is_right(right[name])
    wrong = right[name][output].copy()
    # two bits of the value's second highest byte, which no rounding explains
    width = wrong.itemsize
    wrong.reshape(-1).view(np.uint8)[place * width + max(width - 2, 0)] ^= 0x50
    with pytest.raises(CheckFailed):
        is_right(right[name] | {output: wrong})


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\nhealthy\n") and "FAILED" not in text
    assert "No GPU kernel was run" in text
    assert all(name in text for name in CHECKS)
    assert "cache_write      cpu      paddle" in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert fd_dsa(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["device"] == "cpu"
    assert found["packages"]["paddlepaddle"] and found["packages"]["triton"]
    assert {check["name"] for check in found["checks"]} == set(CHECKS)
    assert found["providers"]["indexer_query"]["cpu"]["provider"] == "paddle"


def test_a_wrong_result_and_an_error_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(memory: Memory) -> dict[str, np.ndarray]:
        raise RuntimeError("the kernel\nis gone")

    run, _, on_devices = CHECKS["topk"]
    wrong = (run, lambda out: self_check.require(False, "row 1 is another"), on_devices)
    monkeypatch.setitem(CHECKS, "topk", wrong)
    monkeypatch.setitem(CHECKS, "cache_write", (breaks, CHECKS["cache_write"][1], True))
    assert doctor.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "row 1 is another" in text and "RuntimeError: the kernel\n" in text
    assert text.count("FAILED") == 3 and "NOT healthy" in text


def test_a_device_is_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    run, is_right, _ = CHECKS["topk"]

    def differs(memory: Memory) -> dict[str, np.ndarray]:
        out = run(Memory("cpu"))
        if not memory.on_host:
            out["best"][2, 0] += 1
        return out

    monkeypatch.setattr(self_check, "CHECKS", {"topk": (differs, is_right, True)})
    host, device = self_check.run_checks("gpu:0")
    assert host["passed"] and host["device"] == "cpu"
    assert not device["passed"] and device["device"] == "gpu:0"
    assert device["detail"] == "best: 1 of 24 values differ from the CPU's"


def test_an_unknown_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "npu:3"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fd_dsa: error: --device: got 'npu:3', allowed: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ["paddle", "triton"])
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == package else 1)
    assert doctor.main([]) == 1
    assert capsys.readouterr().err.startswith(f"fd_dsa: error: {package} is not installed; pip ")


def test_what_was_not_checked_is_said() -> None:
    gpu = {"name": "x", "driver": "y"}
    assert "no NVIDIA GPU" in environment.not_checked("cpu", None, True)
    assert "GPU is there" in environment.not_checked("cpu", gpu, False)
    assert "interpreted" in environment.not_checked("gpu:0", gpu, True)
    assert environment.not_checked("gpu:0", gpu, False) == ""


def test_as_a_module_of_its_own() -> None:
    command = [sys.executable, "-m", "fd_dsa.doctor", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == ("interpreted" if INTERPRETING else "compiled")
    assert "_provider.py" not in done.stderr


@pytest.mark.gpu_rig
def test_the_kernels_of_a_device() -> None:
    found = doctor.examine()
    assert found["device"] != "cpu"
    assert found["kernels"] == ("interpreted" if INTERPRETING else "compiled")
    assert found["healthy"], [c for c in found["checks"] if not c["passed"]]
    assert found["providers"]["cache_write"][found["device"].split(":")[0]]["provider"] == "triton"
