"""The process: its variables, processors and log; the only module that reads the environment."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fd_dsa.errors import ConfigError

OVERLAP_VARIABLE = "FD_DSA_OVERLAP_MAX_TOKENS"
DEFAULT_OVERLAP_MAX_TOKENS = 16
"""Most tokens of a captured step whose indexer projections run on a second stream.

No more than the `limit_tokens` of benchmarks/results/engine_overlap*.json, past which the fork was
measured not to pay; a test compares the two.
"""

# with less the server of the demo model does not start
_LEAST_ADDRESS_SPACE_BYTES = 3 << 29
# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_cpu_threads: int | None = None
_SWITCH = {"0": False, "false": False, "1": True, "true": True}


def prepare_cpu_runtime() -> None:
    """Set what Paddle reads from the environment, then import it; call it before all others do.

    The MKL of its CPU build takes a slow path on AMD processors unless a variable says that AVX2 is
    there (2.6 times faster float32 GEMMs measured), and keeps one order of sums for any number of
    rows if another one asks for it. OpenMP's idle threads spin for 200 ms, which slows what the
    main thread does beside them; 1 ms is enough between two GEMMs. glibc gives the pages of arrays
    of some MiB back and gets zeroed ones for the next step, a hundredth of a long prompt's time; so
    it keeps more. A value that the user has set stays. Paddle's advice to install ccache is
    silenced.

    Raises:
        ConfigError: the folder that Paddle makes when it is imported cannot be made, or `ulimit -v`
            leaves no room for its libraries.
    """
    check_address_space()
    _make_paddle_folder()
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        vendor_is_amd = False
    set_heaps("mmap_threshold", _M_MMAP_THRESHOLD, 32 << 20)
    set_heaps("trim_threshold", _M_TRIM_THRESHOLD, 256 << 20)
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    if vendor_is_amd:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if batch_invariant():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    _import_paddle()


def set_heaps(name: str, parameter: int, value: int) -> bool:
    """Set a parameter of glibc's allocator, by mallopt(3).

    Args:
        name: as in `glibc.malloc.arena_max`.

    Returns:
        False where the environment sets it, or the allocator is not glibc's.
    """
    names = f"MALLOC_{name.upper()}", f"MALLOC_{name.upper()}_"
    if any(map(variable, names)) or f"glibc.malloc.{name}" in variable("GLIBC_TUNABLES"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))


def _import_paddle() -> None:
    """Import Paddle, where it is installed, and keep the signal handlers of the caller.

    Paddle's own one for SIGTERM, set when it is imported, prints a C++ stack. An import that is
    cut off leaves a damaged heap, so signals wait for its end. Blocking them here would not do:
    another thread would take them.
    """
    handlers: dict[signal.Signals, Any] = {}
    late: list[int] = []
    # other threads may not
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda caught, _: late.append(caught))
    try:
        with suppress(ImportError):
            import paddle  # noqa: F401
    finally:
        for number, handler in handlers.items():
            # a handler from outside of Python is unknown, and is lost
            signal.signal(number, handler or signal.SIG_DFL)
    for caught in late:
        signal.raise_signal(caught)


def check_address_space() -> None:
    """Refuse a `ulimit -v` under which libraries fail to load, each with a dump of its own.

    Raises:
        ConfigError: the address space of this process is limited to less than 1.5 GiB.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST_ADDRESS_SPACE_BYTES:
        raise ConfigError(
            f"ulimit -v: got {limit // 1024}, allowed: at least "
            f"{_LEAST_ADDRESS_SPACE_BYTES // 1024} (1.5 GiB), of which Paddle's libraries take "
            "most, and more for a model; raise it, or limit memory by a control group"
        )


def _make_paddle_folder() -> None:
    """Make the folder for data sets whose absence would fail the import of Paddle.

    Source: paddle/dataset/common.py of Paddle 3.3.
    """
    home = os.path.expanduser("~")
    try:
        if not os.access(home, os.W_OK):
            home = tempfile.gettempdir()
        Path(home, ".cache", "paddle", "dataset").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"HOME: Paddle needs a folder .cache/paddle below it (below TMPDIR where HOME cannot "
            f"be written to), and it cannot be made: {error}; set HOME to a folder that this "
            "process can write to"
        ) from error


def has_nvidia_gpu() -> bool:
    """True where the NVIDIA driver shows this process a device; no driver call is made."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def nvidia_smi(fields: str, gpu: str = "") -> list[str]:
    """What nvidia-smi reports, one line a GPU; none where it is missing or does not answer.

    Args:
        gpu: number or UUID of one GPU, "" = all.
    """
    # late: few commands ask
    import subprocess

    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            [*query, *(["-i", gpu] if gpu else [])], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def installed_version(package: str) -> str:
    """Version of an installed package, "" without it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def choose_triton_mode() -> bool:
    """True if Triton kernels of this process run in Triton's interpreter, False if compiled.

    Triton decides at its own import, for good: call this before. On a machine without a GPU it
    sets TRITON_INTERPRET=1, unless the user has set the variable or Triton is loaded already.
    """
    value = os.environ.get("TRITON_INTERPRET")
    if value is None and "triton" not in sys.modules and not has_nvidia_gpu():
        os.environ["TRITON_INTERPRET"] = value = "1"
    return (value or "").lower() in ("1", "true", "yes", "on", "y")


def batch_invariant() -> bool:
    """True if FD_DSA_BATCH_INVARIANT=1: a token's numbers depend on its row alone; as `switch`."""
    return switch("FD_DSA_BATCH_INVARIANT") or False


def launches_overlap() -> bool:
    """False if FD_DSA_PDL=0: no kernel starts before the one before it has ended; as `switch`."""
    return switch("FD_DSA_PDL") is not False


def fastdeploy_plugin_wanted() -> bool:
    """True where the plug-in shall take FastDeploy's DSA path over.

    That is with FD_ATTENTION_BACKEND=DSA_ATTN, FastDeploy's own switch, and without
    FD_DSA_DISABLE=1.
    """
    chosen = os.environ.get("FD_ATTENTION_BACKEND") == "DSA_ATTN"
    return chosen and not switch("FD_DSA_DISABLE")


def switch(name: str) -> bool | None:
    """Value of a variable that is 0 or 1; None where it is unset or empty.

    Raises:
        ConfigError: it is none of 0, 1, false and true, in any case.
    """
    value = variable(name)
    if not value:
        return None
    try:
        return _SWITCH[value.lower()]
    except KeyError:
        raise ConfigError(f"{name}: got {value!r}, allowed: 0, 1, false, true, or unset") from None


def overlap_max_tokens() -> int | None:
    """Most tokens of a step whose indexer projections run on a second stream; 0 = never.

    FD_DSA_OVERLAP_MAX_TOKENS, which holds for eager steps too; None where it is not set.

    Raises:
        ConfigError: the variable is no number of at least 0.
    """
    value = variable(OVERLAP_VARIABLE)
    if not value:
        return None
    if not value.isdecimal():
        raise ConfigError(
            f"{OVERLAP_VARIABLE}: got {value!r}, allowed: a number of tokens, 0 for no "
            f"second stream; leave it unset for {DEFAULT_OVERLAP_MAX_TOKENS} in graphs alone"
        )
    return int(value)


def variable(name: str) -> str:
    """A variable without white space around it; "" where it is unset."""
    return os.environ.get(name, "").strip()


def set_default(name: str, value: str) -> None:
    """Set a variable that a library reads later; a value that the user has set stays."""
    os.environ.setdefault(name, value)


def process_environment() -> dict[str, str]:
    """A copy of this process's environment, such as a child may get with changes."""
    return dict(os.environ)


def format_address(host: str, port: object) -> str:
    """`host:port`, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_url(host: str, port: object) -> str:
    """The URL under which this machine reaches a server that listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{format_address(local, port)}"


def usable_cpus() -> int:
    """Number of processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def set_cpu_threads(num_threads: int) -> int:
    """Give Paddle's CPU kernels this many threads and return the number."""
    import paddle

    paddle.base.core.set_num_threads(num_threads)
    global _cpu_threads
    _cpu_threads = num_threads
    return num_threads


def cpu_threads() -> int | None:
    """What `set_cpu_threads` was last given; None before."""
    return _cpu_threads


@contextmanager
def quiet() -> Iterator[None]:
    """Our log says no more than warnings inside, where a report says the rest."""
    package = logging.getLogger("fd_dsa")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
