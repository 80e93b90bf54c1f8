"""A server for the duration of a run: `python -m fd_dsa.serve` on a free port."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fd_dsa.client.remote import normal_base_url
from fd_dsa.config import demo_model_path
from fd_dsa.environment import process_environment, set_default, variable
from fd_dsa.errors import ConfigError, writing

_POLL_S = 0.05
# any free port; a short shutdown, because a run that ends needs no more answers; no prefix caching,
# so that every prompt is computed in full. The user's flags come later and take precedence
_FLAGS = ("--port", "0", "--shutdown-timeout", "1", "--no-enable-prefix-caching")
_END_TIMEOUT_S = 30.0
# the line break shows that the line is complete
_READY = re.compile(rb"^fd_dsa \S+ serves .* on (http://\S+)\n", re.MULTILINE)
_ERROR = re.compile(rb"^fd_dsa: error: (.*)$", re.MULTILINE)
_PR_SET_PDEATHSIG = 1
# loaded before the fork, because little code may run in the child after it
_libc = ctypes.CDLL(None, use_errno=True)


def add_server_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags of a command that uses a server, or starts one for its run."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--base-url", metavar="URL", help="server URL, e.g. http://HOST:PORT/v1")
    either.add_argument(
        "--serve",
        metavar="MODEL",
        nargs="?",
        # no text, because an empty one is refused
        const=demo_model_path(),
        help="start a server on MODEL for the run, on the demo model without one; flags after -- "
        "are for it (the default without --base-url)",
    )
    parser.add_argument("--model", metavar="NAME", help="name to send (default: the only one)")


def check_passed(base_url: str | None, passed: Sequence[str]) -> None:
    """Raise ConfigError if there are flags for a server of our own, but a running one is used."""
    if base_url is not None and passed:
        raise ConfigError(
            "flags after --: they are for a server of our own; leave out the address of another one"
        )


@dataclass(frozen=True)
class OwnServer:
    """A running server.

    Attributes:
        command: its command line, without the interpreter's path.
    """

    base_url: str
    command: tuple[str, ...]
    log: Path
    pid: int


@contextlib.contextmanager
def server_at(
    base_url: str | None, model: str | Path | None, flags: Sequence[str], flag: str
) -> Iterator[str]:
    """Yield the base URL of a server: the given one, or a new one for the block.

    Raises:
        ConfigError: the URL is not an http or https URL, or our own server does not start.
    """
    if base_url is not None:
        yield normal_base_url(base_url)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        own_server(model, flags, Path(folder) / "server.log", flag) as server,
    ):
        yield server.base_url


@contextlib.contextmanager
def own_server(
    model: str | Path | None, flags: Sequence[str], log: Path, flag: str = "--serve"
) -> Iterator[OwnServer]:
    """Start a server that ends with the block, and in any case with this process.

    Raises:
        ConfigError: the server does not start. The message is its own error, after `flag`.
    """
    is_demo = model is None or model == demo_model_path()
    arguments = [*([] if is_demo else [str(model)]), *flags]
    # the innermost folder first
    made = [path for path in (log.parent, *log.parent.parents) if not path.exists()]
    with writing("--out", log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fd_dsa.serve", *_FLAGS, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            # Ctrl-C reaches only the run, which then ends the server
            start_new_session=True,
            # the kernel ends the server when this process is killed
            preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
        )
    try:
        try:
            url = _wait_until_ready(process, log)
        except BaseException as error:
            # remove files of a failed start, also after Ctrl-C
            log.unlink(missing_ok=True)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, ConfigError):
                # the caller's `flag` stands for --model
                reason = str(error).removeprefix("--model: ")
                raise ConfigError(f"{flag}: {reason}") from None
            raise
        yield OwnServer(f"{url}/v1", ("python", "-m", "fd_dsa.serve", *arguments), log, process.pid)
    finally:
        _end(process)


def _environment() -> dict[str, str]:
    """Return the server's environment: with keys for servers, it accepts that of this client too.

    Without a key for clients, this process sends the first of the server's keys.
    """
    environment = process_environment()
    if keys := variable("FD_DSA_API_KEY"):
        set_default("OPENAI_API_KEY", keys.partition(",")[0].strip())
        sent = variable("OPENAI_API_KEY")
        environment["FD_DSA_API_KEY"] = f"{keys},{sent}" if sent else keys
    return environment


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the URL of the server, without a path, when it reports that it serves."""
    while True:
        ended = process.poll() is not None
        output = log.read_bytes()
        if ready := _READY.search(output):
            return ready[1].decode("ascii")
        if ended:
            raise ConfigError(_why_it_ended(process.returncode, output))
        # on a full disk the line that is waited for may be lost
        if shutil.disk_usage(log.parent).free == 0:
            raise ConfigError(f"no space left on the disk for {log}, the server's log")
        time.sleep(_POLL_S)


def _why_it_ended(status: int, output: bytes) -> str:
    if errors := _ERROR.findall(output):
        return errors[-1].decode("utf-8", "replace")
    lines = output.decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "(no output)")
    return f"the server ended with status {status}; its last line: {last.strip()}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server by a signal. Kill it after a timeout or a second Ctrl-C."""
    try:
        process.terminate()
        process.wait(_END_TIMEOUT_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()
