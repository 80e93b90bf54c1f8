"""What the doctor says of the operators: missing, built, broken, or wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fd_dsa import custom_ops, doctor
from fd_dsa.doctor import custom_ops as section
from fd_dsa.doctor import self_check

pytest.importorskip("paddle")


@pytest.fixture(autouse=True)
def unsettled() -> Iterator[None]:
    """Nothing is known before a test, nor after it."""
    custom_ops.use_library(None)
    yield
    custom_ops.use_library(None)


@pytest.fixture
def installed(ops: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package as if it were installed."""
    monkeypatch.setitem(sys.modules, "fd_dsa_ops", ops)
    return ops


def test_a_missing_package_is_said_and_is_healthy() -> None:
    found = section.facts("cpu")
    assert (found["state"], found["checks"], found["path"]) == ("missing", [], "")
    assert section.is_healthy(found)
    [line] = section.as_lines(found)
    assert line == "custom ops missing: not installed; make custom-ops, or pip install ./custom_ops"


def test_a_built_package_is_checked_operator_by_operator(installed: Any) -> None:
    found = section.facts("cpu")
    assert found["state"] == "built" and found["path"] == str(installed.LIBRARY)
    assert {check["name"] for check in found["checks"]} == set(installed.__all__)
    assert all(check["passed"] and check["device"] == "cpu" for check in found["checks"]), found
    assert section.is_healthy(found)
    lines = section.as_lines(found)
    assert lines[0].startswith("custom ops built: for Paddle 3.")
    assert lines[0].endswith(f" without CUDA kernels ({installed.LIBRARY})")
    assert "           get_position_ids_and_mask_encoder_batch on cpu: ok" in lines


@pytest.mark.parametrize("name", sorted(section.CHECKS))
def test_a_wrong_operator_is_found(
    installed: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(installed, name, lambda *args, **kwargs: None)
    found = section.facts("cpu")
    failed = [check for check in found["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == [name]
    assert not section.is_healthy(found)
    [line] = [line for line in section.as_lines(found) if "FAILED" in line]
    assert line.startswith(f"           {name} on cpu: FAILED: ")


def test_a_broken_package_makes_the_doctor_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_check, "CHECKS", {})
    (tmp_path / "fd_dsa_ops.py").write_text("raise ImportError('built beside Paddle 2.6.0')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "\ncustom ops BROKEN: built beside Paddle 2.6.0\n" in text
    assert text.endswith("NOT healthy: see what FAILED or is BROKEN above\n")


def test_what_serves_on_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    custom_ops.choose("topk", lambda kernels: "")
    lines = section.as_lines(section.facts("cpu"))
    assert lines[1].startswith("           topk on a GPU: triton serves (fd_dsa_ops is missing: ")
    assert len(lines) == 2
