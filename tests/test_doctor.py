"""The doctor finds what is wrong, says it in a line, and its exit status tells."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa import custom_ops, doctor
from fd_dsa.cli import main as fd_dsa
from fd_dsa.doctor import checks
from fd_dsa.environment import nvidia_smi
from fd_dsa.ops.cache_probes import CASES
from fd_dsa.ops.probes import Case, CheckFailed, Memory, Outputs, require
from fd_dsa.ops.providers import function
from fd_dsa.triton_runtime import INTERPRETING
from tests.kernel_memory import open_memory

ROOT = Path(__file__).resolve().parent.parent
# output -> where a wrong value has to be found: the first one, or one that only some rows have
TAMPERED = [
    ("step_metadata", "slot_mapping", 2),
    ("step_metadata", "position_ids", 0),
    ("step_metadata", "indexer_attn_mask_offsets", 5),
    ("step_metadata", "cu_seqlens_kg", 2),
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
    ("position_ids", "positions", 5),
    ("mla_query", "query", 3),
    ("mla_query", "query", 520),
    ("indexer_projection", "weights", 2),
    ("dequantize", "fp8_ds_mla", 4 * 576),
    ("topk", "40 best", 0),
    ("topk", "40 best", 8),
    ("topk", "40 best", 23),
    ("topk", "9000 best", 27),
    ("sparse_mla", "float32", 0),
    ("sparse_mla", "bfloat16", 3 * 512),
    ("sparse_mla", "bfloat16", 6 * 512),
    ("sparse_mla", "fp8_ds_mla", 12 * 512 - 1),
]


@pytest.mark.parametrize(("name", "output", "place"), TAMPERED)
def test_a_wrong_value_is_found(name: str, output: str, place: int) -> None:
    results = CASES[name].run(function(name, "numpy"), Memory())
    out = next(results)
    wrong = out[output] = out[output].copy()
    # two bits of the value's second highest byte, which no rounding explains
    width = wrong.itemsize
    wrong.reshape(-1).view(np.uint8)[place * width + max(width - 2, 0)] ^= 0x50
    with pytest.raises(CheckFailed):
        list(results)


def test_a_healthy_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fd_dsa(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and found["device"] == "cpu"
    assert found["packages"]["paddlepaddle"] and found["packages"]["triton"]
    assert {check["name"] for check in found["checks"]} == set(CASES)
    assert {check["provider"] for check in found["checks"]} == {"numpy"}
    assert all(check["reason"] and check["ms"] >= 0 for check in found["checks"])
    monkeypatch.setenv("COLUMNS", "1000")
    text = doctor.as_text(found)
    assert text.endswith("\nhealthy\n") and "FAILED" not in text
    assert "No GPU kernel was run" in text
    assert "\ngraphs     none: a CPU has no graphs\n" in text
    assert "\n  cache_write        cpu       numpy              ok" in text
    # it fits a narrow terminal, commands excepted, which are pasted
    monkeypatch.setenv("COLUMNS", "60")
    narrow = doctor.as_text(found)
    whole = [line for line in narrow.splitlines() if len(line) > 60]
    assert all("pip install" in line for line in whole)
    words = " ".join(narrow.split())
    assert words.count("CPU: NumPy; GEMMs by oneDNN or Paddle") == len(CASES)
    assert "Only the CPU was checked." in words


def test_a_wrong_result_and_an_error_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(call: Any, memory: Memory) -> Iterator[Outputs]:
        raise RuntimeError("the kernel\nis gone")

    def wrong(call: Any, memory: Memory) -> Iterator[Outputs]:
        yield {}
        require(False, "row 1 is another")

    monkeypatch.setattr(checks, "CASES", {"topk": Case(wrong), "cache_write": Case(breaks)})
    assert doctor.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "row 1 is another" in text and "RuntimeError: the kernel\n" in text
    assert text.count("FAILED") == 3 and "NOT healthy" in text


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose tensors are host memory, and whose kernels are interpreted."""
    memory = open_memory("interpreter")
    monkeypatch.setattr("fd_dsa.device.allocation.paddle_allocator", lambda device: memory.poisoned)


def on_a_device(
    monkeypatch: pytest.MonkeyPatch, *, same_bytes: bool, spoil: float
) -> list[dict[str, Any]]:
    """The rows for an operator whose result on a device is off by `spoil`."""

    def run(call: Any, memory: Memory) -> Iterator[Outputs]:
        out = {"x": np.array([1.0, 2.0 if memory.on_host else 2.0 + spoil])}
        yield out
        require(abs(out["x"] - [1, 2]) < 1e-3, "x is off")

    monkeypatch.setattr(checks, "CASES", {"mla_query": Case(run, same_bytes)})
    return checks.run_checks("gpu:0")


@pytest.mark.triton
def test_a_device_is_compared_with_the_cpu(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = on_a_device(monkeypatch, same_bytes=True, spoil=1e-6)
    assert host["passed"] and host["device"] == "cpu"
    assert not device["passed"] and device["device"] == "gpu:0"
    assert device["detail"] == "x: 1 of 2 values differ from the CPU's"


@pytest.mark.triton
def test_sums_of_a_device_are_compared_with_their_definition(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(c["passed"] for c in on_a_device(monkeypatch, same_bytes=False, spoil=1e-6))
    host, device = on_a_device(monkeypatch, same_bytes=False, spoil=1e-2)
    assert host["passed"] and device["detail"] == "x is off"


@pytest.mark.triton
@pytest.mark.parametrize("capability", [90, 100])
def test_every_provider_of_a_device(
    on_a_gpu: None, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fd_dsa.triton_runtime.driver import GpuTraits, cuda

    traits = GpuTraits(capability, 1, 227 << 10)
    monkeypatch.setattr(cuda(), "traits", lambda device: traits)
    cases = {name: CASES[name] for name in ("indexer_logits", "sparse_mla")}
    monkeypatch.setattr(checks, "CASES", cases)
    rows = [row for row in checks.run_checks("gpu:0") if row["device"] != "cpu"]
    assert all(row["passed"] for row in rows), rows
    served = {row["name"]: row["provider"] for row in rows if row["serves"]}
    attends = "triton_tensor_core" if capability == 90 else "triton"
    assert served == {"indexer_logits": "triton_tensor_core", "sparse_mla": attends}
    lines = checks.as_lines(rows)
    assert any(line.endswith("kernel; triton_tensor_core serves") for line in lines)
    refused = [line for line in lines if "capability 100, tiles are made for 90" in line]
    assert len(refused) == (capability == 100)
    assert all(line.split()[2:4] == ["triton_tensor_core", "no"] for line in refused)


@pytest.mark.triton
def test_tf32_is_found(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import paddle

    monkeypatch.setattr("fd_dsa.device.resolve.keep_float32", lambda device: None)
    assert checks.check_float32("gpu:0")["passed"]
    exact = paddle.matmul

    def rounded(left: Any, right: Any) -> Any:
        bits = left.numpy().view(np.uint32) & 0xFFFFE000
        return exact(paddle.to_tensor(bits.view(np.float32)), right)

    monkeypatch.setattr(paddle, "matmul", rounded)
    row = checks.check_float32("gpu:0")
    assert not row["passed"] and row["detail"] == "1 + 2^-12 times 1 is 1: that is TF32"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topk=triton", "FD_DSA_OP_PROVIDER requests it: it does not support tensors on cpu"),
        ("topk=torch", "FD_DSA_OP_PROVIDER: got 'topk=torch'"),
    ],
)
def test_a_provider_that_is_asked_for_in_vain(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", text)
    monkeypatch.setattr(checks, "CASES", {"topk": CASES["topk"]})
    assert doctor.main(["--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_an_unknown_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--device", "npu:3"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fd_dsa: error: --device: got 'npu:3', the installed Paddle has: cpu")
    assert said.count("\n") == 1


@pytest.mark.parametrize("package", ["numpy", "paddle"])
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == package else 1)
    assert doctor.main([]) == 1
    assert capsys.readouterr().err.startswith(f"fd_dsa: error: {package} is not installed; ")


@pytest.mark.parametrize("device", ["cpu", "npu:3"])
def test_the_log_of_its_caller_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: str
) -> None:
    def run(call: Any, memory: Memory) -> Iterator[Outputs]:
        package.info("what the table says anyway")
        package.warning("what it does not say")
        yield {}

    package = logging.getLogger("fd_dsa")
    monkeypatch.setattr(checks, "CASES", {"topk": Case(run)})
    caplog.set_level(logging.INFO, package.name)
    assert doctor.main(["--device", device]) == (device != "cpu")
    package.info("after it")
    said = ["what it does not say"] if device == "cpu" else []
    assert caplog.messages == [*said, "after it"]


def test_what_was_not_checked_is_said() -> None:
    gpu = {"name": "x", "driver": "y"}
    assert "no NVIDIA GPU" in doctor.not_checked("cpu", None, True)
    assert "GPU is there" in doctor.not_checked("cpu", gpu, False)
    assert "interpreted" in doctor.not_checked("gpu:0", gpu, True)
    assert doctor.not_checked("gpu:0", gpu, False) == ""


def test_as_a_module_of_its_own() -> None:
    command = [sys.executable, "-m", "fd_dsa.doctor", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == ("interpreted" if INTERPRETING else "compiled")
    assert "providers.py" not in done.stderr


def test_a_python_without_any_package(tmp_path: Path) -> None:
    # -S: no site-packages, so that only the standard library and the working folder are there
    command = [sys.executable, "-S", "-m", "fd_dsa.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("fd_dsa: error: numpy is not installed; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.gpu_rig
@pytest.mark.parametrize("device", [[], ["--device", "hopper:0"], ["--device", "hopper"]])
def test_the_kernels_of_a_device(device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([*device, "--json"]) == 0, capsys.readouterr().out
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == ("interpreted" if INTERPRETING else "compiled")
    rows = [row for row in found["checks"] if row["device"] != "cpu"]
    assert {row["name"] for row in rows} == {*CASES, "float32 GEMM"}
    assert {row["name"] for row in rows if row["provider"] == "triton"} == set(CASES)


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
    found = doctor.graph_facts("gpu:0", interpreting)
    assert found["reason"] == reason and bool(found["sizes"]) == (not reason)
    assert found["sizes"][:5] == ([] if reason else [1, 2, 4, 8, 16])


@pytest.mark.gpu_rig
def test_a_kernel_that_is_wrong_on_a_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fd_dsa.ops.mla import triton_kernel

    attend = triton_kernel.attend_slots

    def slightly_off(*tensors: Any, softmax_scale: float, kv_lora_rank: int) -> None:
        attend(*tensors, softmax_scale=1.001 * softmax_scale, kv_lora_rank=kv_lora_rank)

    monkeypatch.setattr(triton_kernel, "attend_slots", slightly_off)
    failed = [c for c in doctor.examine("hopper:0")["checks"] if not c["passed"]]
    assert [(c["name"], c["device"]) for c in failed] == [("sparse_mla", "hopper:0")]


@pytest.mark.parametrize("state", ["missing", "built", "broken"])
def test_the_library_of_custom_ops(
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = {
        "missing": f"not installed; {custom_ops.build_command()} builds it",
        "built": "for Paddle 3.3.1 without CUDA kernels (x.so)",
        "broken": f"built beside Paddle 2.6.0; build it again: {custom_ops.build_command()}",
    }
    if state == "broken":
        text = "raise ImportError('built beside Paddle 2.6.0')\n"
        (tmp_path / "fd_dsa_ops.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    elif state == "built":
        # writes nothing, which is wrong
        record = {"paddle": "3.3.1", "cuda": None, "archs": []}
        names = {"get_position_ids_and_mask_encoder_batch": lambda *tensors: None}
        package = SimpleNamespace(LIBRARY="x.so", BUILD=record, __all__=list(names), **names)
        monkeypatch.setitem(sys.modules, "fd_dsa_ops", package)
    case = {"position_ids": CASES["position_ids"]}
    monkeypatch.setattr(checks, "CASES", case)
    monkeypatch.setenv("COLUMNS", "80")
    custom_ops.use_library(None)
    assert doctor.main(["--device", "cpu"]) == (state != "missing")
    custom_ops.use_library(None)
    out = capsys.readouterr().out
    mark = "BROKEN" if state == "broken" else state
    assert f"\ncustom ops {mark}: {lines[state]}\n" in out, out
    assert ("positions: got [-7, " in out) == (state == "built")


@pytest.mark.parametrize(("status", "lines"), [(0, ["one", "two"]), (9, []), (None, [])])
def test_what_nvidia_smi_reports(
    status: int | None, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if status is None:
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, status, stdout="one\ntwo\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert nvidia_smi("name", "3") == lines == nvidia_smi("name")
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    assert commands == [[*query, "-i", "3"], query]
