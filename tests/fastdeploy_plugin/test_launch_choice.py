"""`--engine auto`: FastDeploy where it is installed and one device is not enough."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fd_dsa.config import demo_model_path
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch import choice
from fd_dsa.fastdeploy_plugin.launch.choice import choose_engine, refuse_for_embedded
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags
from fd_dsa.models import memory_plan
from fd_dsa.serve.flag_sources import parse_args

GIB = 1 << 30
SEVERAL = [
    (["-tp", "8"], "--tensor-parallel-size is 8"),
    (["--data-parallel-size", "2"], "--data-parallel-size is 2"),
    (["--enable-expert-parallel"], "--enable-expert-parallel is set"),
    (["--", "--ips", "a,b"], "--ips stands after --"),
]


def flags(*argv: str) -> tuple[dict[str, Any], frozenset[str], PassedFlags]:
    args = parse_args(argv)
    return vars(args), args.given, PassedFlags.read(args.passed)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FastDeploy is there, on a machine without a GPU and with 64 GiB."""
    monkeypatch.setattr(choice, "find_spec", lambda name: name == "fastdeploy" or None)
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(memory_plan, "available_memory_bytes", lambda: 64 * GIB)
    return monkeypatch


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastDeploy is not there."""
    monkeypatch.setattr(choice, "find_spec", lambda name: None)


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


@pytest.mark.parametrize(("argv", "why"), SEVERAL)
def test_flags_for_several_devices_take_fastdeploy_or_are_an_error(
    argv: list[str], why: str, installed: pytest.MonkeyPatch
) -> None:
    assert choose_engine(*flags(*argv)) == ("fastdeploy", why)
    with pytest.raises(ConfigError, match=f"{why}, and --engine embedded serves on one device"):
        refuse_for_embedded(*flags(*argv))
    installed.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=f"^{why}, which needs FastDeploy") as caught:
        choose_engine(*flags(*argv))
    assert "Paddle's own package index" in str(caught.value)
    assert "--engine embedded serves" in str(caught.value)


def test_one_device_by_flag_is_one_device() -> None:
    refuse_for_embedded(*flags("-tp", "1", "--data-parallel-size", "1"))


@pytest.mark.usefixtures("installed")
def test_a_model_that_fits_is_embedded(large: str, installed: pytest.MonkeyPatch) -> None:
    engine, why = choose_engine(*flags())
    assert engine == "embedded"
    assert why == "one device is enough: weights 74.9 MiB in float32, 64.0 GiB free in host memory"
    installed.setattr(memory_plan, "available_memory_bytes", lambda: 1 << 50)
    assert choose_engine(*flags(large))[0] == "embedded"


@pytest.mark.usefixtures("installed")
def test_a_model_that_does_not_fit_takes_fastdeploy(large: str) -> None:
    engine, why = choose_engine(*flags(large))
    assert engine == "fastdeploy"
    assert why.startswith("one device is not enough: weights ") and "GiB in float32, 64.0" in why


@pytest.mark.usefixtures("absent")
def test_without_fastdeploy_the_embedded_engine_says_what_does_not_fit(large: str) -> None:
    engine, why = choose_engine(*flags(large))
    assert (engine, why.endswith("is not installed")) == ("embedded", True)


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "llama"}'])
@pytest.mark.usefixtures("installed")
def test_a_folder_without_a_size_is_left_to_the_embedded_engine(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert choose_engine(*flags(str(tmp_path)))[0] == "embedded"


class TestMemoryOfAGpu:
    """With a GPU and Paddle for it, the GPU's memory counts."""

    @pytest.fixture
    def asked(self, installed: pytest.MonkeyPatch) -> list[list[str]]:
        """nvidia-smi answers 1024 MiB; the queries that were made."""
        calls: list[list[str]] = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(list(command))
            return subprocess.CompletedProcess(command, 0, stdout="1024\n")

        installed.setattr(choice, "has_nvidia_gpu", lambda: True)
        installed.setattr(choice, "version", lambda name: "3.3.1")
        installed.setattr(choice.subprocess, "run", run)
        return calls

    @pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,1", "3"), ("GPU-a", "GPU-a")])
    def test_the_first_visible_one_is_asked(
        self,
        asked: list[list[str]],
        monkeypatch: pytest.MonkeyPatch,
        visible: str | None,
        first: str,
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose_engine(*flags())[1].endswith("1.0 GiB on the GPU")
        assert asked[0][-1] == first

    def test_it_is_what_must_hold_the_weights(self, asked: list[list[str]], large: str) -> None:
        assert choose_engine(*flags(large))[0] == "fastdeploy"
        assert asked

    def test_on_the_cpu_it_does_not_count(self, asked: list[list[str]]) -> None:
        assert "host memory" in choose_engine(*flags("--device", "cpu"))[1]
        assert not asked

    def test_with_paddle_for_cpus_it_does_not_count(
        self, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(name: str) -> str:
            raise choice.PackageNotFoundError(name)

        monkeypatch.setattr(choice, "version", none)
        assert "host memory" in choose_engine(*flags())[1]
        assert not asked

    @pytest.mark.parametrize("answer", ["", "[N/A]", None])
    def test_a_gpu_that_does_not_say_is_left_aside(
        self, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, answer: str | None
    ) -> None:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            if answer is None:
                raise FileNotFoundError
            return subprocess.CompletedProcess(command, 0, stdout=answer)

        monkeypatch.setattr(choice.subprocess, "run", run)
        assert "host memory" in choose_engine(*flags())[1]
