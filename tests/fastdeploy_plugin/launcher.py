"""Real launcher processes over the double's API server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.fakes import trees
from tests.serve.banner import read_banner

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180


@dataclass
class Launcher:
    """A launcher process, which becomes the server.

    Attributes:
        process: the process, its output in pipes.
        dump_file: file with the arguments and the environment of the double's server.
    """

    process: subprocess.Popen[str]
    dump_file: Path

    def banner(self) -> str:
        """Return the lines on stdout before the `curl` command, which is read too."""
        assert self.process.stdout is not None
        before, curl = read_banner(self.process.stdout.readline)
        if not curl:
            raise AssertionError(self.process.communicate())
        return before[before.index("fd_dsa ") :]

    def wait(self, url: str) -> dict[str, Any]:
        """Wait for the server; returns what it was started with."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()
            try:
                assert httpx.get(f"{url}/health", trust_env=False).is_success
                return json.loads(self.dump_file.read_text())
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not come up")

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
    engine: str = "fastdeploy",
    tree: trees.Tree = trees.DEVELOP,
    path: Iterable[str | Path] = (),
) -> Iterator[Launcher]:
    """Run the command line in a process.

    Args:
        folder: for the model and the files of this run.
        argv: further arguments; the server gets any free port unless one is among them.
        script: script of the double's server (`api_server.Script`).
        env: variables of the launcher; None unsets one.
        model: add the folder `model` in `folder` as the model's.
        engine: value of `--engine`.
        tree: FastDeploy tree that the double plays.
        path: folders in front of it on sys.path.
    """
    (folder / "model").mkdir(exist_ok=True)
    dump = folder / "dump.json"
    double = {
        "FAKE_FASTDEPLOY_DUMP": str(dump),
        "FAKE_FASTDEPLOY_SERVER": json.dumps(script or {}),
    }
    variables = environment(plugin_folder(folder / "site"), {**double, **(env or {})}, tree, path)
    given = [str(folder / "model")] if model else []
    port = [] if "--port" in argv else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fd_dsa.serve", "--engine", engine, *port, *given, *argv],
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Launcher(process, dump)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


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
