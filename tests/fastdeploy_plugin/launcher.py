"""Real launcher processes over the double's API server, and what they leave behind.

As a program it is `python -m fd_dsa.serve` that waits briefly, does not ask a child whether
FastDeploy can be imported, and says at its end whether it imported FastDeploy itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes import trees

ROOT = Path(__file__).resolve().parents[2]
SAY_EVERY_S = 0.4
ENGINE = "FastDeploy 1.2.3"
TIMEOUT_S = 180


@dataclass
class Launcher:
    """A launcher process.

    Attributes:
        process: the process, its output in pipes.
        dump_file: where the double's server says what it was started with.
    """

    process: subprocess.Popen[str]
    dump_file: Path

    def dump(self) -> dict[str, Any]:
        """What the server was started with, waited for."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.dump_file.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the server was not started"
            time.sleep(0.02)
        return json.loads(self.dump_file.read_text())

    def ready_line(self) -> str:
        """The line on stdout that says where the server is, waited for; the curl line is read."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("fd_dsa "):
                assert self.process.stdout.readline().startswith("curl ")
                return line
        raise AssertionError(self.process.communicate())

    def finish(self) -> tuple[int, str, str]:
        """Status, stdout and stderr, waited for."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err


@contextmanager
def launcher(
    folder: Path,
    *argv: str,
    script: Mapping[str, Any] | None = None,
    env: Mapping[str, str | None] | None = None,
    model: bool = True,
    whole: bool = False,
    engine: str = "fastdeploy",
    tree: trees.Tree = trees.DEVELOP,
    path: Iterable[str | Path] = (),
    ignores_interrupts: bool = False,
) -> Iterator[Launcher]:
    """Run the command line in a process; `--engine` is added.

    Args:
        folder: for the model and the files of this run.
        argv: further arguments; the server gets any free port where none is among them. From the
            default port on, servers of tests that run at the same time would choose the same.
        model: add the folder `model` in `folder` as the model's.
        script: what the double's server does (`api_server.Script`).
        env: variables of the launcher; None unsets one.
        whole: the real command line, not that of this file.
        engine: what `--engine` says.
        tree: which FastDeploy the double plays.
        path: folders in front of it on sys.path.
        ignores_interrupts: start it as a shell without job control starts its background jobs.
    """
    (folder / "model").mkdir(exist_ok=True)
    dump = folder / "dump.json"
    double = {
        "FAKE_FASTDEPLOY_DUMP": str(dump),
        "FAKE_FASTDEPLOY_SERVER": json.dumps(script or {}),
    }
    variables = environment(plugin_folder(folder / "site"), {**double, **(env or {})}, tree, path)
    module = "fd_dsa.serve" if whole else "tests.fastdeploy_plugin.launcher"
    given = [str(folder / "model")] if model else []
    port = [] if "--port" in argv else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--engine", engine, *port, *given, *argv],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a group of its own, as a shell gives each of its jobs
        start_new_session=True,
        preexec_fn=_ignore_interrupts if ignores_interrupts else None,
    )
    try:
        yield Launcher(process, dump)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a launcher, whatever its test did."""
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def plugin_folder(folder: Path) -> Path:
    """A folder for sys.path in which fd_dsa has its entry points, as an installed package has."""
    if not folder.exists():
        module = "fd_dsa.fastdeploy_plugin"
        targets = {"register": f"{module}:register", "runner": f"{module}:model_runner"}
        trees.plugin_distribution(folder, "fd_dsa", **targets)
    return folder


def environment(
    plugin: Path,
    env: Mapping[str, str | None],
    tree: trees.Tree = trees.DEVELOP,
    path: Iterable[str | Path] = (),
) -> dict[str, str]:
    """The environment of a process in which the double can be imported, and fd_dsa."""
    entries = [str(entry) for entry in (*path, trees.FOLDER, plugin, ROOT)]
    changes = trees.environment(tree, env=env, path=entries)
    found: dict[str, str | None] = {**os.environ, **changes}
    return {name: value for name, value in found.items() if value is not None}


def is_running(pid: int) -> bool:
    """True while a process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def main() -> int:
    """The command line with short waits."""
    from fd_dsa.fastdeploy_plugin.launch import start
    from fd_dsa.serve.cli import main as serve

    start._SAY_EVERY_S = SAY_EVERY_S
    start._HEALTH_EVERY_S = 0.05
    start._check_import = lambda plan: ENGINE
    status = serve()
    imported = sorted(name for name in sys.modules if name.partition(".")[0] == "fastdeploy")
    with suppress(BrokenPipeError):
        print(f"imported: {imported}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
