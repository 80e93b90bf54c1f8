"""The run on a GPU, with sections that need none: limits, resuming, the gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_run
from benchmarks._harness import environment
from benchmarks.gpu_run import Section

Runner = Callable[..., int]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs these sections with these flags; the folder is tmp_path / "out"."""

    def runner(sections: list[Section], *flags: str) -> int:
        monkeypatch.setattr(gpu_run, "sections", lambda args: sections)
        # what --commit sets is gone after the test
        monkeypatch.setenv("FD_DSA_COMMIT", "")
        return gpu_run.main(["--out", str(tmp_path / "out"), *flags])

    return runner


def state(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out/run.json").read_text())


def test_every_section_is_logged_and_has_a_status(run: Runner, tmp_path: Path) -> None:
    expected = {
        "good": ("passed", "fine"),
        "bad": ("failed", "broken"),
        "slow": ("out of time", "begun"),
        # a session of tests that skipped everything
        "tests_all": ("failed", "3 skipped"),
        "after": ("passed", ""),
    }
    sections = [
        Section("good", python("print('fine')"), 60),
        Section("bad", python("raise SystemExit('broken')"), 60),
        # a shell, which says its word long before the limit
        Section("slow", ("sh", "-c", "echo begun; sleep 60"), 1),
        Section("absent", ("no-such-tool",), 60),
        Section("tests_all", python("print('3 skipped')"), 60, must_say=" passed"),
        Section("after", python(""), 60),
    ]
    assert run(sections) == 1
    found = state(tmp_path)
    assert found.pop("absent")["status"] == "not installed"
    assert {k: (entry["status"], entry["last"]) for k, entry in found.items()} == expected
    assert (tmp_path / "out/good.log").read_text() == "fine\n"


@pytest.mark.parametrize(
    ("processes", "sleeps", "status"),
    [((), 0, "failed"), (("-n", "2"), 60, "out of time")],
    ids=["in one process", "out of time in several"],
)
def test_a_run_names_failed_tests(
    run: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    processes: tuple[str, ...],
    sleeps: int,
    status: str,
) -> None:
    # no process loads plug-ins that it does not need, so that it begins long before the limit
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = tmp_path / "test_of_run.py"
    file.write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_red(x):\n    assert x > 1\n"
        f"def test_slow():\n    time.sleep({sleeps})\n"
    )
    flags = ("-v", "-p", "no:cacheprovider", "-p", "xdist", *processes)
    tests = (sys.executable, "-m", "pytest", *flags, str(file))
    assert run([Section("tests_all", tests, 4 if sleeps else 60)]) == 1
    entry = state(tmp_path)["tests_all"]
    assert entry["status"] == status
    (name,) = entry["failed_tests"]
    assert name.endswith("test_of_run.py::test_red[1]")
    assert f"failed: {name}" in capsys.readouterr().out


def test_a_second_run_goes_on(run: Runner, tmp_path: Path) -> None:
    counter = tmp_path / "count"
    count = Section("count", python(f"open({str(counter)!r}, 'a').write('x')"), 60)
    flaky = Section("flaky", python(f"assert len(open({str(counter)!r}).read()) > 1"), 60)
    assert run([count, flaky]) == 1
    counter.write_text("xx")
    assert run([count, flaky]) == 0
    assert counter.read_text() == "xx", "a section that passed ran again"


def test_red_tests_end_the_run(run: Runner, tmp_path: Path) -> None:
    small = Section("tests_small", python("raise SystemExit(1)"), 60, ends_run=True)
    assert run([small, Section("later", python(""), 60)]) == 1
    assert "later" not in state(tmp_path)


@pytest.mark.parametrize(
    ("other", "every", "gate"),
    [
        ("tests_small", "", "passed"),
        ("tests_small", "1", "failed"),
        ("tests_alone", "", "failed"),
    ],
    ids=["the small ones are among all", "some failed", "all lack those alone"],
)
def test_benchmarks_know_the_gate(
    run: Runner, tmp_path: Path, other: str, every: str, gate: str
) -> None:
    """The other tests are out of time."""
    tests = [
        Section(other, python("raise SystemExit(75)"), 60, ends_run=True),
        Section("tests_all", python(f"raise SystemExit({every})"), 60),
    ]
    names = "FD_DSA_GATE", "FD_DSA_COMMIT", "FD_DSA_LIMIT_S"
    show = f"import os; print(*(os.environ[name] for name in {names}))"
    run([*tests, Section("figures", python(show), 60)], "--commit", "abc-dirty")
    assert state(tmp_path)["figures"]["last"] == f"{gate} abc-dirty 60"


def test_the_summary_names_results_with_and_without_a_gate(
    run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    for name, changes in {"kernel": {"gate": "passed"}, "engine": {"error": "gone"}}.items():
        result = {"cases": [{"case": "one"}]} | changes
        (tmp_path / f"out/{name}.json").write_text(json.dumps(result))
    assert run([Section("a", python(""), 60)]) == 0
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "-- kernel (gate passed)" in said and "-- engine gone" in said


def test_only_and_budget(run: Runner, tmp_path: Path) -> None:
    sections = [Section(name, python(""), 60) for name in ("a", "b", "c")]
    assert run(sections, "--only", "a") == 0
    assert set(state(tmp_path)) == {"a"}
    assert run(sections, "--budget-s", "1") == 1
    assert set(state(tmp_path)) == {"a"}
    with pytest.raises(SystemExit, match="no section d; there are a, b, c"):
        run(sections, "--only", "d")


def test_the_command_of_every_section() -> None:
    args = gpu_run.parse_arguments(["--peers", "/p", "--quick", "--out", "/o"])
    sections = {section.name: section for section in gpu_run.sections(args)}
    assert sections["tests_small"].ends_run
    assert sections["ceilings"].command[-5:] == ("--out", "/o", "--peers", "/p", "--quick")
    assert "tests/test_kernel_memory.py" in sections["tests_all"].command
    # the tests' processes find the library built
    assert list(sections).index("custom_ops") < list(sections).index("tests_small")
    for tool in ("memcheck", "racecheck"):
        checked = " ".join(sections[tool].command)
        assert "tests/v4_prepare/" in checked and "tests/custom_ops/" in checked


def test_benchmarks_of_the_engine_take_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    args = gpu_run.parse_arguments(["--rig", "--vllm", "/v", "--out", "/o"])
    found = gpu_run.engine_sections(args)
    assert "gpu_engine_peer" in [section.name for section in found]
    assert len(gpu_run.engine_sections(gpu_run.parse_arguments(["--rig"]))) == len(found) - 4
    for section in found:
        module, *flags = section.command[2:]
        if module == "pytest":
            continue
        with pytest.raises(SystemExit):
            import_module(module).main([*flags, "--none-such"])
        assert capsys.readouterr().err.endswith(": unrecognized arguments: --none-such\n"), section


@pytest.mark.slow
def test_gpu_tests_are_collected_without_paddle() -> None:
    """The benchmarks are imported too, for which `make test` has no torch."""
    benchmarks = ("ceilings", *gpu_run.BENCHMARKS) if find_spec("torch") else ("gpu_run",)
    modules = ", ".join(f"benchmarks.{name}" for name in benchmarks)
    code = "import sys; sys.modules['paddle'] = None; import pytest; "
    code += f"status = pytest.main(sys.argv[1:]); import {modules}; sys.exit(status)"
    flags = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", *gpu_run.gpu_tests()]
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=gpu_run.ROOT)
    failed = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert done.returncode == 0, f"they run without Paddle: {failed} {done.stderr[-500:]}"


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_DSA_COMMIT", "1" * 40)
    assert (environment()["commit"], environment()["dirty"]) == ("1" * 40, False)
    monkeypatch.setenv("FD_DSA_COMMIT", "1" * 40 + "-dirty")
    assert (environment()["commit"], environment()["dirty"]) == ("1" * 40, True)


@pytest.mark.parametrize(("visible", "gpu"), [("0", "NVIDIA H200"), ("", ""), ("-1", "")])
def test_a_gpu_that_is_hidden_is_not_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, gpu: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.159.04'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # the machine has a device file
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    found = environment()
    assert (found["gpu"], found["driver"]) == (gpu, "580.159.04" if gpu else "")
