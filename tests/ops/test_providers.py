"""The table of providers: what serves where, what FD_DSA_OP_PROVIDER asks for, and why not."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("paddle", reason="the operators are on Paddle tensors")

import paddle

from benchmarks._facts import start_log
from fd_dsa import custom_ops
from fd_dsa.errors import BackendUnavailable, ConfigError, KernelUnavailable
from fd_dsa.ops import providers
from fd_dsa.ops.cache_probes import CASES, TENSOR_CORE_CASES
from fd_dsa.ops.probes import Memory, topk_case
from fd_dsa.ops.providers import (
    OPERATORS,
    available_providers,
    function,
    select_all,
    select_provider,
    selected_function,
    table,
)
from tests.custom_ops.building import emulated_library
from tests.kernel_memory import open_memory

PAIRS = [(operator, provider) for operator, served in OPERATORS.items() for provider in served]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is chosen or asked for before a test, nor after it."""
    monkeypatch.delenv("FD_DSA_OP_PROVIDER", raising=False)
    custom_ops.use_library(None)
    with providers.asking_for({}):
        yield
    custom_ops.use_library(None)


def install(monkeypatch: pytest.MonkeyPatch, archs: tuple[str, ...] = ()) -> None:
    """A package fd_dsa_ops with a record of its build."""
    package = SimpleNamespace(
        LIBRARY=shutil.which("true"),
        BUILD={"paddle": "3.3.1", "cuda": None, "archs": list(archs)},
        __all__=["get_position_ids_and_mask_encoder_batch"],
    )
    monkeypatch.setitem(sys.modules, "fd_dsa_ops", package)


class Place(str):
    """A place on a device, as Paddle prints a custom one."""

    def __str__(self) -> str:
        return f"Place({str.__str__(self)}:0)"

    def is_cpu_place(self) -> bool:
        return False

    def is_gpu_place(self) -> bool:
        return self == "gpu"


def test_refusals_end_with_the_block_that_asks() -> None:
    where = "indexer_logits", "gpu", providers.TENSOR_CORE
    with providers.asking_for({}):
        providers.refuse(*where, KernelUnavailable("it cannot be compiled"))
        assert providers.is_refused(*where)
    assert not providers.is_refused(*where)
    providers.refuse(*where, KernelUnavailable("it cannot be compiled"))
    with providers.asking_for({}):
        assert not providers.is_refused(*where)
    assert providers.is_refused(*where)


@pytest.mark.parametrize(("operator", "provider"), PAIRS)
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_pair_serves_or_has_a_reason(
    kind: str, operator: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", f"{operator}={provider}")
    wanted = {("numpy", "cpu"), *((p, "gpu") for p in ("triton", "triton_tensor_core", "gemm"))}
    if (provider, kind) in wanted:
        assert select_provider(operator, kind).provider == provider
        assert table()[operator][kind].rejected == {}
        return
    if provider == "custom_op" and (kind == "gpu" or operator == "position_ids"):
        reason = "fd_dsa_ops is missing: not installed; .* -m pip install"
    else:
        reason = f"it serves tensors on {'a CPU' if provider == 'numpy' else 'a device'}"
    message = f"FD_DSA_OP_PROVIDER: {operator}={provider} cannot serve on {kind}: {reason}"
    with pytest.raises(BackendUnavailable, match=message):
        select_provider(operator, kind)
    assert table() == {}


@pytest.mark.triton
@pytest.mark.parametrize(("operator", "provider"), PAIRS)
def test_every_function_agrees_with_the_definition(operator: str, provider: str) -> None:
    if provider == "custom_op":
        assert callable(function(operator, provider))
        return
    case = topk_case((40, 8), (1104, 7)) if operator == "topk" else CASES[operator]
    case = TENSOR_CORE_CASES[operator] if provider == "triton_tensor_core" else case
    memory = Memory(None if provider == "numpy" else open_memory("interpreter").poisoned)
    assert case.difference(function(operator, provider), memory) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk", "got 'topk' .*allowed: topk=custom_op, topk=numpy, topk=triton, separated"),
        ("topk=torch", "got 'topk=torch' .*allowed: topk=custom_op"),
        ("attention=triton", "got 'attention=triton' .*step_metadata=numpy, .*sparse_mla=triton"),
        ("topk=triton;a=b", "got 'topk=triton;a=b' in"),
    ],
)
def test_a_variable_that_cannot_be_read(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", text)
    with pytest.raises(ConfigError, match=f"FD_DSA_OP_PROVIDER: {message}"):
        select_provider("cache_write", "cpu")


def test_the_former_name_of_the_provider_for_cpus_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "topk=paddle, mla_query=triton")
    assert providers.requested() == {"topk": "numpy", "mla_query": "triton"}


@pytest.mark.parametrize("tensor", [np.zeros(1), paddle.zeros([1])], ids=["numpy", "paddle"])
def test_a_choice_is_logged_once(tensor: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        assert len({selected_function("cache_write", tensor) for _ in range(3)}) == 1
    text = "cache_write on cpu: numpy (CPU: NumPy; GEMMs by oneDNN or Paddle)"
    assert caplog.messages == [text]
    assert table()["cache_write"]["cpu"].provider == "numpy"


@pytest.mark.parametrize("kind", ["gpu", "hopper", "cuda"])
@pytest.mark.parametrize(("mode", "word"), [("1", "an interpreted"), ("0", "a compiled")])
def test_a_device(
    kind: str,
    mode: str,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", mode)
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        tensor = SimpleNamespace(place=Place(kind))
        if kind == "cuda":
            tensor = SimpleNamespace(device=SimpleNamespace(type=kind))
        assert selected_function("mla_query", tensor) is function("mla_query", "triton")
    assert caplog.messages == [f"mla_query on {kind}: triton (a device, {word} Triton kernel)"]


def test_settling_covers_what_has_one_provider_and_sees_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    select_all("cpu")
    assert set(table()) == set(OPERATORS) - {"position_ids"}
    select_all("gpu")
    assert [op for op in OPERATORS if "gpu" not in table().get(op, {})] == [
        *("position_ids", "indexer_logits", "topk", "sparse_mla")
    ]
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "topk=custom_op")
    with pytest.raises(BackendUnavailable, match="topk=custom_op cannot serve on cpu"):
        select_all("cpu")


def test_the_page_of_operations_has_the_log_of_a_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        select_all("cpu")
    (line,) = caplog.messages
    assert f"INFO {line}\n" in start_log()


def test_a_faster_provider_that_cannot_serve_is_named(caplog: pytest.LogCaptureFixture) -> None:
    reasons = {"triton_tensor_core": "the cache is float32"}
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        choice = select_provider("indexer_logits", "gpu", reasons)
        assert select_provider("indexer_logits", "gpu", reasons) == choice
        assert select_provider("indexer_logits", "gpu").provider == "triton_tensor_core"
    assert choice.rejected == {"triton_tensor_core": "the cache is float32"}
    first, second = caplog.messages
    assert first.endswith(" Triton kernel; not triton_tensor_core: the cache is float32)")
    assert "triton_tensor_core (a device, a" in second
    assert available_providers("indexer_logits", "gpu") == ["triton_tensor_core", "triton"]


def agrees(kernels: Any) -> str:
    return ""


def fails(kernels: Any) -> str:
    raise AttributeError("no such symbol")


@pytest.mark.parametrize(
    ("state", "probe", "level", "reason"),
    [
        ("missing", agrees, "INFO", "fd_dsa_ops is missing: not installed; "),
        ("no kernels", agrees, "INFO", "fd_dsa_ops is built for Paddle 3.3.1 without CUDA kernels"),
        ("broken", agrees, "WARNING", "fd_dsa_ops is broken: libX.so: undefined symbol: f"),
        ("kernels", fails, "WARNING", "its probe failed: AttributeError: no such symbol"),
        ("kernels", lambda kernels: "row 1 is off", "WARNING", "row 1 is off"),
        ("kernels", agrees, "INFO", ""),
    ],
)
def test_a_kernel_of_custom_ops(
    state: str,
    probe: Any,
    level: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    if state == "no kernels":
        install(monkeypatch)
    elif state == "broken":
        text = "raise ImportError('libX.so: undefined symbol: f')\n"
        (tmp_path / "fd_dsa_ops.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    elif state == "kernels":
        custom_ops.use_library(emulated_library("position_ids"))
    with caplog.at_level(logging.INFO, "fd_dsa"):
        choices = [select_provider("topk", "gpu", probe=probe) for _ in range(2)]
    assert [record.levelname for record in caplog.records] == [level]
    assert choices[0].provider == ("triton" if reason else "custom_op")
    assert reason in choices[0].rejected.get("custom_op", "")
    monkeypatch.setenv("FD_DSA_OP_PROVIDER", "topk=custom_op")
    if reason:
        with pytest.raises(BackendUnavailable, match=f"topk=custom_op cannot serve .*{reason}"):
            select_provider("topk", "gpu", probe=probe)


def test_the_registered_operator_needs_no_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert select_provider("position_ids", "cpu").provider == "custom_op"
    choice = select_provider("position_ids", "gpu")
    assert choice.provider == "triton" and "without CUDA" in choice.rejected["custom_op"]
    custom_ops.use_library(emulated_library("position_ids"))
    assert (
        "without Paddle's operators" in select_provider("position_ids", "gpu").rejected["custom_op"]
    )


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"none\.so: .*; build it again"):
        custom_ops.use_library(tmp_path / "none.so")
