"""A CPU without Triton: everything that computes there, and the errors of what needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fd_dsa.config import demo_model_path
from tests.serve.processes import TIMEOUT_S, environment, serving

pytest.importorskip("paddle", reason="the engine computes on Paddle")

# Python imports this module when a process starts; it leaves a mark, as a proof that it was there
WITHOUT_TRITON = """
import os, pathlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Absent())
pathlib.Path(__file__).with_name(f"absent-{os.getpid()}").touch()
"""
# generates on a CPU; then Paddle answers as a build for GPUs on a machine that has some
ENGINE = """
import paddle
from fd_dsa.config import demo_model_path
from fd_dsa import LLM, SamplingParams
from fd_dsa.errors import BackendUnavailable
with LLM(demo_model_path(), device="cpu") as llm:
    (said,) = llm.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0))
print(len(said.token_ids))
paddle.device.is_compiled_with_cuda = lambda: True
paddle.device.cuda.device_count = lambda: 2
for device in ("gpu", "auto"):
    try:
        LLM(demo_model_path(), device=device)
    except BackendUnavailable as error:
        print(error)
"""
MODULES = """
import importlib, json, pkgutil, fd_dsa
from fd_dsa.environment import prepare_cpu_runtime
from fd_dsa.errors import BackendUnavailable
prepare_cpu_runtime()
refused = {}
for module in pkgutil.walk_packages(fd_dsa.__path__, "fd_dsa."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except BackendUnavailable as error:
            refused[module.name] = str(error)
print(json.dumps(refused))
"""
# rooms, and modules of rooms, that are loaded only for a device
ON_A_DEVICE = ("fd_dsa.ops.", "fd_dsa.triton_runtime", "fd_dsa.distributed.", *(
    "fd_dsa." + name
    for name in (
        "attention.dense_prompts", "attention.device", "attention.device_memory",
        "attention.device_scores", "attention.head_exchange", "device.side_stream",
        "device.staging", "device.transfers", "models.deepseek_v4.device_attention",
        "models.deepseek_v4.device_model", "models.deepseek_v4.device_moe",
        "models.device_weights", "runner.device_block_store",
        "runner.device_steps", "step.device_provider", "v4_attention.device_backend",
        "v4_attention.device_memory", "v4_attention.device_step", "v4_prepare.kernel",
        "v4_prepare.launch", "v4_prepare.place_kernel",
    )
))  # fmt: skip
CURE = "-m pip install 'triton>=3.3,<3.10'"


@pytest.fixture
def without_triton(tmp_path: Path) -> dict[str, str]:
    """Variables of a process, and of those that it starts, in which Triton cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRITON)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}


def python(
    variables: dict[str, str], *arguments: str, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python with these variables to its end."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.slow
def test_a_server_starts_and_answers(tmp_path: Path, without_triton: dict[str, str]) -> None:
    flags = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')
    with serving(tmp_path, *flags, env=without_triton) as server, server.client() as client:
        said = client.completions.create(
            model="demo_model",
            prompt="Hello",
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    assert said.usage is not None and said.usage.completion_tokens == 8
    # the server's own process and the engine's
    assert len(list(tmp_path.glob("absent-*"))) >= 2


@pytest.mark.slow
def test_the_doctor_checks_every_operator_of_a_cpu(without_triton: dict[str, str]) -> None:
    arguments = ("-m", "fd_dsa.doctor", "--json", "--device", "cpu")
    found = json.loads(python(without_triton, *arguments).stdout)
    assert found["healthy"] and found["checks"]
    assert found["kernels"] == "unavailable"


@pytest.mark.slow
def test_only_modules_for_devices_need_it(without_triton: dict[str, str]) -> None:
    refused = json.loads(python(without_triton, "-c", MODULES).stdout)
    assert "fd_dsa.step.device_provider" in refused
    assert [name for name in refused if not name.startswith(ON_A_DEVICE)] == []
    assert all(CURE in message for message in refused.values())
    public = {"fd_dsa.ops", "fd_dsa.ops.topk", "fd_dsa.ops.mla", "fd_dsa.distributed"}
    assert public & set(refused) == set()


def test_a_plan_of_gpus_names_the_cure(tmp_path: Path, without_triton: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text((demo_model_path() / "config.json").read_text())
    arguments = ("-m", "fd_dsa", "doctor", "--plan", str(tmp_path), "-tp", "2")
    done = python(without_triton, *arguments, status=2)
    assert done.stderr.startswith("fd_dsa: error: --plan: triton is not installed, and the plan")
    assert CURE in done.stderr and done.stderr.endswith("; a GPU is not needed\n")
    assert done.stdout == "" and done.stderr.count("\n") == 1


def test_the_embedded_engine_computes_on_a_cpu_and_names_the_cure_for_a_gpu(
    without_triton: dict[str, str],
) -> None:
    tokens, *refused = python(without_triton, "-c", ENGINE).stdout.splitlines()
    assert tokens == "4"
    # one line for each device that was asked for
    assert len(refused) == 2
    for said in refused:
        assert said.startswith("triton cannot be imported (No module named 'triton')")
        assert CURE in said
