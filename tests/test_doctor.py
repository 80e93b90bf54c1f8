"""The doctor finds what is wrong, says it in a line, and its exit status tells."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import doctor
from fd_dsa.cli import main as fd_dsa
from fd_dsa.doctor import environment, graphs, self_check, tensor_cores
from fd_dsa.doctor.case import Check, CheckFailed, Memory, require
from fd_dsa.doctor.self_check import CHECKS
from fd_dsa.ops import _provider
from fd_dsa.triton_runtime import INTERPRETING
from tests.kernel_memory import open_memory

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
    ("indexer_logits", "float32", 0),
    ("indexer_logits", "float32", 67),
    ("indexer_logits", "bfloat16", 2 * 71 + 68),
    ("indexer_logits", "fp8_ds_mla", 3 * 71 + 70),
    ("indexer_logits", "fp8_ds_mla", 4 * 71),
    ("topk", "best", 0),
    ("topk", "best", 8),
    ("topk", "best", 23),
    ("sparse_mla", "float32", 0),
    ("sparse_mla", "bfloat16", 3 * 512),
    ("sparse_mla", "bfloat16", 6 * 512),
    ("sparse_mla", "fp8_ds_mla", 12 * 512 - 1),
]


@pytest.fixture(scope="module")
def right() -> dict[str, dict[str, np.ndarray]]:
    """What every operator gives on the CPU."""
    return {name: check.run(Memory("cpu")) for name, check in CHECKS.items()}


@pytest.mark.parametrize(("name", "output", "place"), TAMPERED)
def test_a_wrong_value_is_found(right: Any, name: str, output: str, place: int) -> None:
    is_right = CHECKS[name].is_right
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
    assert "\ngraphs     none: a CPU has none\n" in text
    assert all(name in text for name in CHECKS)
    assert "\n  cache_write        cpu       paddle     ok" in text


def test_it_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert doctor.main(["--device", "cpu"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 60
    words = " ".join(narrow.split())
    assert words.count("a CPU: NumPy, and products by Paddle") == len(CHECKS)
    assert "The CPU was checked alone." in words


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert fd_dsa(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["device"] == "cpu"
    assert found["packages"]["paddlepaddle"] and found["packages"]["triton"]
    assert {check["name"] for check in found["checks"]} == set(CHECKS)
    assert {check["provider"] for check in found["checks"]} == {"paddle"}
    assert all(check["reason"] and check["ms"] >= 0 for check in found["checks"])


def test_a_wrong_result_and_an_error_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(memory: Memory) -> dict[str, np.ndarray]:
        raise RuntimeError("the kernel\nis gone")

    wrong = Check(CHECKS["topk"].run, lambda out: require(False, "row 1 is another"))
    monkeypatch.setitem(CHECKS, "topk", wrong)
    monkeypatch.setitem(CHECKS, "cache_write", Check(breaks, CHECKS["cache_write"].is_right))
    assert doctor.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "row 1 is another" in text and "RuntimeError: the kernel\n" in text
    assert text.count("FAILED") == 3 and "NOT healthy" in text


def on_a_device(
    monkeypatch: pytest.MonkeyPatch, *, same_bytes: bool, spoil: float
) -> list[dict[str, Any]]:
    """The findings for an operator whose device result is off by `spoil`."""

    def run(memory: Memory) -> dict[str, np.ndarray]:
        return {"x": np.array([1.0, 2.0 if memory.on_host else 2.0 + spoil])}

    def is_right(out: dict[str, np.ndarray]) -> None:
        require(abs(out["x"] - [1, 2]) < 1e-3, "x is off")

    monkeypatch.setattr(self_check, "CHECKS", {"topk": Check(run, is_right, same_bytes)})
    return self_check.run_checks("gpu:0")


def test_a_device_is_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = on_a_device(monkeypatch, same_bytes=True, spoil=1e-6)
    assert host["passed"] and host["device"] == "cpu"
    assert not device["passed"] and device["device"] == "gpu:0"
    assert device["detail"] == "x: 1 of 2 values differ from the CPU's"


def test_sums_of_a_device_are_compared_with_their_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(c["passed"] for c in on_a_device(monkeypatch, same_bytes=False, spoil=1e-6))
    host, device = on_a_device(monkeypatch, same_bytes=False, spoil=1e-2)
    assert host["passed"] and device["detail"] == "x is off"


def test_an_unknown_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "npu:3"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fd_dsa: error: --device: got 'npu:3', the installed Paddle has: cpu")
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ["numpy", "paddle", "triton"])
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == package else 1)
    assert doctor.main([]) == 1
    assert capsys.readouterr().err.startswith(f"fd_dsa: error: {package} is not installed; pip ")


@pytest.mark.parametrize("device", ["cpu", "npu:3"])
def test_the_log_of_its_caller_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    def run(memory: Memory) -> dict[str, np.ndarray]:
        package.info("what the table says anyway")
        package.warning("what it does not say")
        return {}

    package = logging.getLogger("fd_dsa")
    monkeypatch.setattr(self_check, "CHECKS", {"topk": Check(run, lambda out: None)})
    caplog.set_level(logging.INFO, package.name)
    assert doctor.main(["--device", device]) == (device != "cpu")
    package.info("after it")
    said = ["what it does not say"] if device == "cpu" else []
    assert caplog.messages == [*said, "after it"]


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


def test_a_python_without_any_package(tmp_path: Path) -> None:
    # -S: no site-packages, so that only the standard library and the working folder are there
    command = [sys.executable, "-S", "-m", "fd_dsa.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("fd_dsa: error: numpy is not installed; pip install ")
    assert done.stderr.count("\n") == 1


@pytest.mark.gpu_rig
@pytest.mark.parametrize("device", [[], ["--device", "hopper:0"], ["--device", "hopper"]])
def test_the_kernels_of_a_device(
    device: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # what served the models of other tests in this process would be told, too
    monkeypatch.setattr(_provider, "_against", {})
    assert doctor.main([*device, "--json"]) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == ("interpreted" if INTERPRETING else "compiled")
    checks = [check for check in found["checks"] if check["device"] != "cpu"]
    assert [check["name"] for check in checks] == list(CHECKS)
    assert {check["provider"] for check in checks} == {"triton"}


@pytest.mark.parametrize(
    ("interpreting", "supported", "reason"),
    [
        (True, True, "Triton kernels are interpreted in this process"),
        (False, False, "this build of Paddle has no CUDA graphs"),
        (False, True, ""),
    ],
)
def test_whether_decode_steps_are_captured(
    interpreting: bool, supported: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paddle.device.cuda import graphs as paddle_graphs

    monkeypatch.setattr(paddle_graphs, "is_cuda_graph_supported", lambda: supported)
    found = graphs.facts("gpu:0", interpreting)
    assert found["reason"] == reason and bool(found["sizes"]) == (not reason)
    line = graphs.as_line(found)
    assert reason in line if reason else "decode steps of 1, 2, 4, 8, 16" in line


@pytest.mark.triton
def test_kernels_on_tensor_cores_by_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fd_dsa.triton_runtime.transfers import Transfers

    memory = open_memory("interpreter")
    monkeypatch.setattr("fd_dsa.attention.device.empty_allocator", lambda device: memory.poisoned)
    found = tensor_cores.facts("hopper:0")
    assert [(x["operator"], x["serves"]) for x in found] == [
        ("indexer_logits", True),
        ("sparse_mla", True),
    ]
    assert tensor_cores.as_lines(found)[1].split()[:2] == ["indexer_logits", "yes"]
    assert {x["reason"] for x in tensor_cores.facts("cpu")} == {"it needs a GPU"}
    monkeypatch.setattr(Transfers, "capability", lambda self: 100)
    lines = tensor_cores.as_lines(tensor_cores.facts("hopper:0"))
    assert lines[2].split()[:2] == ["sparse_mla", "no"] and "capability 100" in lines[2]


@pytest.mark.gpu_rig
def test_a_kernel_that_is_wrong_on_a_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fd_dsa.ops.mla import triton_kernel

    attend = triton_kernel.attend_slots

    def slightly_off(*tensors: Any, softmax_scale: float, kv_lora_rank: int) -> None:
        attend(*tensors, softmax_scale=1.001 * softmax_scale, kv_lora_rank=kv_lora_rank)

    monkeypatch.setattr(triton_kernel, "attend_slots", slightly_off)
    failed = [c for c in doctor.examine("hopper:0")["checks"] if not c["passed"]]
    assert [(c["name"], c["device"]) for c in failed] == [("sparse_mla", "hopper:0")]
