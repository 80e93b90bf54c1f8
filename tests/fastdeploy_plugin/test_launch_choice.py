"""`--engine auto`: FastDeploy where it is installed and one device is not enough."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.environment import nvidia_smi
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch import choice
from fd_dsa.fastdeploy_plugin.launch.choice import choose_engine, refuse_for_embedded
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags
from fd_dsa.models import memory_plan
from fd_dsa.serve.flag_sources import parse_args

GIB = 1 << 30
FASTDEPLOY_ONLY = [
    (["--data-parallel-size", "2"], "--data-parallel-size is 2"),
    (["--enable-expert-parallel"], "--enable-expert-parallel is set"),
    (["--", "--ips", "a,b"], "--ips stands after --"),
]


def flags(*argv: str) -> tuple[argparse.Namespace, PassedFlags]:
    args = parse_args(argv)
    return args, PassedFlags.read(args.passed)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FastDeploy is there, on a machine without a GPU and with 64 GiB."""
    monkeypatch.setattr(choice, "find_spec", lambda name: name == "fastdeploy" or None)
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(memory_plan, "available_memory_bytes", lambda: 64 * GIB)
    return monkeypatch


@pytest.fixture
def large(tmp_path: Path) -> str:
    """A folder whose config.json promises more than 64 GiB in float32, and which has no weights."""
    config = json.loads((demo_model_path() / "config.json").read_text())
    config |= {"num_hidden_layers": 61, "n_routed_experts": 256, "moe_intermediate_size": 2048}
    config |= {"num_experts_per_tok": 8, "hidden_size": 7168}
    for derived in ("mlp_layer_types", "indexer_types"):
        config.pop(derived, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(("argv", "why"), FASTDEPLOY_ONLY)
def test_flags_for_several_devices_take_fastdeploy_or_are_an_error(
    argv: list[str], why: str, installed: pytest.MonkeyPatch
) -> None:
    assert choose_engine(*flags(*argv)) == ("fastdeploy", why)
    with pytest.raises(ConfigError, match=f"{why}, which --engine embedded does not have"):
        refuse_for_embedded(*flags(*argv))
    installed.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=f"^{why}, which needs FastDeploy") as caught:
        choose_engine(*flags(*argv))
    assert "Paddle's own package index" in str(caught.value)
    assert "--engine embedded serves" in str(caught.value)


def test_several_gpus_take_fastdeploy_where_it_is_installed(
    installed: pytest.MonkeyPatch,
) -> None:
    why = "--tensor-parallel-size is 8"
    assert choose_engine(*flags("-tp", "8")) == ("fastdeploy", why)
    refuse_for_embedded(*flags("-tp", "8"))
    on_a_cpu = choose_engine(*flags("-tp", "8", "--device", "cpu"))
    assert on_a_cpu == ("embedded", "FastDeploy serves on no CPU")
    installed.setattr(choice, "find_spec", lambda name: None)
    assert choose_engine(*flags("-tp", "8"))[0] == "embedded"


def test_the_size_of_the_weights_decides(large: str, installed: pytest.MonkeyPatch) -> None:
    refuse_for_embedded(*flags("-tp", "1", "--data-parallel-size", "1"))
    demo = "one device is enough: weights 74.9 MiB in float32, 64.0 GiB free in host memory"
    assert choose_engine(*flags("-tp", "1")) == ("embedded", demo)
    engine, why = choose_engine(*flags(large))
    assert engine == "fastdeploy"
    assert why.startswith("one device is not enough: weights ") and "GiB in float32, 64.0" in why
    installed.setattr(memory_plan, "available_memory_bytes", lambda: 1 << 50)
    assert choose_engine(*flags(large))[0] == "embedded"
    installed.setattr(memory_plan, "available_memory_bytes", lambda: 0)
    installed.setattr(choice, "find_spec", lambda name: None)
    engine, why = choose_engine(*flags(large))
    assert engine == "embedded" and why.endswith("is not installed")


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "llama"}'])
@pytest.mark.usefixtures("installed")
def test_a_folder_without_a_size_is_left_to_the_embedded_engine(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert choose_engine(*flags(str(tmp_path)))[0] == "embedded"


@pytest.mark.parametrize(
    ("argv", "visible", "package", "answer", "asked_for"),
    [
        ([], None, "3.3.1", ["1024 MiB"], "0"),
        ([], "3,1", "3.3.1", ["1024 MiB"], "3"),
        ([], "GPU-a", "3.3.1", ["1024 MiB"], "GPU-a"),
        # the host's memory counts on the CPU, with Paddle for CPUs, and if the GPU does not say
        (["--device", "cpu"], None, "3.3.1", ["1024 MiB"], None),
        ([], None, "", ["1024 MiB"], None),
        ([], None, "3.3.1", [], "0"),
        ([], None, "3.3.1", ["[N/A]"], "0"),
    ],
)
def test_the_memory_of_a_gpu(
    argv: list[str],
    visible: str | None,
    package: str,
    answer: list[str],
    asked_for: str | None,
    large: str,
    installed: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def nvidia_smi(fields: str, gpu: str) -> list[str]:
        asked.append(gpu)
        return answer

    installed.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        installed.setenv("CUDA_VISIBLE_DEVICES", visible)
    installed.setattr(choice, "has_nvidia_gpu", lambda: True)
    installed.setattr(choice, "installed_version", lambda name: package)
    installed.setattr(choice, "nvidia_smi", nvidia_smi)
    installed.setattr(memory_plan, "available_memory_bytes", lambda: 1 << 50)
    counts = asked_for is not None and answer == ["1024 MiB"]
    where = "1.0 GiB on the GPU" if counts else "free in host memory"
    assert choose_engine(*flags(*argv))[1].endswith(where)
    assert asked == ([] if asked_for is None else [asked_for])
    assert choose_engine(*flags(*argv, large))[0] == ("fastdeploy" if counts else "embedded")


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
