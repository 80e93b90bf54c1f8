"""The process: variables, processors and log.

Only this module reads the environment.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from fd_dsa.errors import ConfigError, shorten

OVERLAP_VARIABLE = "FD_DSA_OVERLAP_MAX_TOKENS"
DEFAULT_OVERLAP_MAX_TOKENS = 16
"""Maximum tokens of a captured step that projects for the indexer on a second stream.

It must not exceed `limit_tokens` of benchmarks/results/engine_overlap*.json, above which the fork
costs more than it saves. A test compares the two.
"""

DIVIDED_VARIABLE = "FD_DSA_DIVIDED_MIN_TOKENS"
DEFAULT_DIVIDED_MIN_TOKENS = 512
"""Minimum tokens past `index_topk` of an eager step whose indexer rows are divided among ranks.

It is an estimate: on two GPUs benchmarks/divided_rows.py compared divided and whole steps from
2,048 tokens on only.
"""

EXCHANGED_VARIABLE = "FD_DSA_EXCHANGED_MIN_TOKENS"

# with less the server of the demo model does not start
_MIN_ADDRESS_SPACE_BYTES = 3 << 29
# parameters of mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_cpu_threads: int | None = None
_SWITCH = {"0": False, "false": False, "1": True, "true": True}


def prepare_cpu_runtime() -> None:
    """Set the environment variables for Paddle, then import it.

    Call it before other imports.

    The MKL of Paddle's CPU build uses a slow path on AMD processors unless a variable declares AVX2
    (2.6 times faster float32 GEMMs measured). Another variable makes it use one order of sums for
    any number of rows. OpenMP's idle threads spin for 200 ms by default, which slows the main
    thread; 1 ms is enough between two GEMMs. By default glibc returns the pages of arrays of some
    MiB and requests zeroed ones for the next step. This costs a hundredth of a long prompt's time,
    so its thresholds are raised. Values that the user has set are kept. Paddle's advice to install
    ccache is silenced.

    Raises:
        ConfigError: the folder that Paddle needs for its import cannot be made, or `ulimit -v`
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
    """Set a parameter of glibc's allocator by mallopt(3).

    Args:
        name: last part of its tunable, as in `glibc.malloc.arena_max`.

    Returns:
        False if the environment sets the parameter, or the allocator is not glibc's.
    """
    names = f"MALLOC_{name.upper()}", f"MALLOC_{name.upper()}_"
    if any(map(variable, names)) or f"glibc.malloc.{name}" in variable("GLIBC_TUNABLES"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(parameter, value))


class _SignalKeeper:
    """Finder that finds no module, but sets signal handlers before each import.

    Paddle's import sets its own handlers by sigaction(2), about a second before it ends.
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        self.numbers, self.caught = numbers, list[int]()
        self.set_handlers()

    def set_handlers(self) -> None:
        """Collect the signals of the keeper instead of acting on them."""
        for number in self.numbers:
            signal.signal(number, lambda caught, _: self.caught.append(caught))

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Set the handlers again, and leave the search to other finders."""
        if threading.current_thread() is threading.main_thread():
            self.set_handlers()


def _import_paddle() -> None:
    """Import Paddle if it is installed, and keep the caller's signal handlers.

    Paddle's import sets a SIGTERM handler that prints a C++ stack. An import that is cut off leaves
    a damaged heap, so signals are delivered after it. Blocking them here is not enough, because
    another thread would receive them.
    """
    # only the main thread can set signal handlers
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    keeper = _SignalKeeper(numbers)
    sys.meta_path.insert(0, keeper)
    try:
        with suppress(ImportError):
            import paddle  # noqa: F401
    finally:
        sys.meta_path.remove(keeper)
        for number, handler in handlers.items():
            # a handler that was not set by Python is unknown and cannot be restored
            signal.signal(number, handler or signal.SIG_DFL)
    for caught in keeper.caught:
        signal.raise_signal(caught)


def check_address_space() -> None:
    """Refuse a `ulimit -v` that makes libraries fail to load with dumps.

    Raises:
        ConfigError: the address space of this process is limited to less than 1.5 GiB.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _MIN_ADDRESS_SPACE_BYTES:
        raise ConfigError(
            f"ulimit -v: got {limit // 1024}, allowed: at least "
            f"{_MIN_ADDRESS_SPACE_BYTES // 1024} (1.5 GiB), of which Paddle's libraries take "
            "most, and more for a model; raise it, or limit memory by a control group"
        )


def _make_paddle_folder() -> None:
    """Make the folder for data sets that Paddle requires for its import.

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
    """Return True if the NVIDIA driver shows this process a device. Calls no driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def nvidia_smi(fields: str, gpu: str = "") -> list[str]:
    """Return nvidia-smi's answer, one line a GPU, empty without an answer.

    Args:
        gpu: number or UUID of one GPU, "" = all.
    """
    # imported late, because few commands need it
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
    """Return the version of an installed package, "" without it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def choose_triton_mode() -> bool:
    """Return True if Triton kernels of this process run in Triton's interpreter.

    Triton decides once, at its own import, so call this before. On a machine without a GPU it sets
    TRITON_INTERPRET=1, unless the user has set the variable or Triton is loaded already.
    """
    value = os.environ.get("TRITON_INTERPRET")
    if value is None and "triton" not in sys.modules and not has_nvidia_gpu():
        os.environ["TRITON_INTERPRET"] = value = "1"
    return (value or "").lower() in ("1", "true", "yes", "on", "y")


def batch_invariant() -> bool:
    """Return True if FD_DSA_BATCH_INVARIANT=1.

    Results are then independent of batch composition.
    """
    return switch("FD_DSA_BATCH_INVARIANT") or False


def launches_overlap() -> bool:
    """Return False if FD_DSA_PDL=0.

    A kernel then starts only after the previous one has ended.
    """
    return switch("FD_DSA_PDL") is not False


def fastdeploy_plugin_wanted() -> bool:
    """Return True if the plug-in should take over FastDeploy's DSA path.

    The condition is FD_ATTENTION_BACKEND=DSA_ATTN, FastDeploy's own switch, without
    FD_DSA_DISABLE=1.
    """
    chosen = os.environ.get("FD_ATTENTION_BACKEND") == "DSA_ATTN"
    return chosen and not switch("FD_DSA_DISABLE")


def switch(name: str) -> bool | None:
    """Return the value of a variable that is 0 or 1, None if it is unset or empty.

    Raises:
        ConfigError: the value is not 0, 1, false or true, in any case.
    """
    value = variable(name)
    if not value:
        return None
    try:
        return _SWITCH[value.lower()]
    except KeyError:
        rule = "allowed: 0, 1, false, true, or unset"
        raise ConfigError(f"{name}: got {shorten(value)}, {rule}") from None


def overlap_max_tokens() -> int | None:
    """Return FD_DSA_OVERLAP_MAX_TOKENS, None if it is unset.

    It is the maximum number of tokens of a step, captured or eager, whose indexer projections run
    on a second stream. 0 = never.

    Raises:
        ConfigError: the value is not a number of at least 0.
    """
    default = f"{DEFAULT_OVERLAP_MAX_TOKENS} in graphs only"
    return _number_of_tokens(OVERLAP_VARIABLE, "no second stream", default)


def divided_min_tokens(default: int = DEFAULT_DIVIDED_MIN_TOKENS) -> int:
    """Return FD_DSA_DIVIDED_MIN_TOKENS, or `default` if it is unset.

    It is the minimum number of tokens of a step with prompts that ranks divide. DeepSeek-V3.2
    counts tokens past `index_topk`, and divides the indexer's rows. 0 = never.

    Raises:
        ConfigError: the value is not a number of at least 0.
    """
    value = _number_of_tokens(DIVIDED_VARIABLE, "no division", str(default))
    return default if value is None else value


def exchanged_min_tokens() -> int:
    """Return FD_DSA_EXCHANGED_MIN_TOKENS, 0 if it is unset.

    It is the minimum number of tokens of an eager step with prompts whose attention is divided
    among ranks by tokens instead of by heads. 0 = never.

    Raises:
        ConfigError: the value is not a number of at least 0.
    """
    return _number_of_tokens(EXCHANGED_VARIABLE, "attention by heads", "0") or 0


def _number_of_tokens(name: str, zero: str, default: str) -> int | None:
    """Return the value of a variable, None if it is unset.

    Args:
        zero: effect of the value 0, for the error.
        default: effect of no value, for the error.

    Raises:
        ConfigError: the value is not a number of at least 0.
    """
    value = variable(name)
    if not value:
        return None
    if not value.isdecimal() or len(value) > 18:
        raise ConfigError(
            f"{name}: got {shorten(value)}, allowed: a number of tokens, 0 for {zero}, max 18 "
            f"digits; leave it unset for {default}"
        )
    return int(value)


def variable(name: str) -> str:
    """Return a variable without surrounding white space, "" if it is unset."""
    return os.environ.get(name, "").strip()


def set_default(name: str, value: str) -> None:
    """Set a variable that a library reads later, unless the user has set it."""
    os.environ.setdefault(name, value)


def process_environment() -> dict[str, str]:
    """Return a copy of this process's environment, for example for a child process."""
    return dict(os.environ)


def format_address(host: str, port: object) -> str:
    """Return `host:port`, with IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_url(host: str, port: object) -> str:
    """Return the URL by which this machine reaches a server that listens on `host`."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{format_address(local, port)}"


def usable_cpus() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0))


def set_cpu_threads(num_threads: int) -> int:
    """Set the number of threads of Paddle's CPU kernels, and return it."""
    import paddle

    paddle.base.core.set_num_threads(num_threads)
    global _cpu_threads
    _cpu_threads = num_threads
    return num_threads


def cpu_threads() -> int | None:
    """Return the last number given to `set_cpu_threads`, None before."""
    return _cpu_threads


@contextmanager
def quiet() -> Iterator[None]:
    """Log only warnings inside the block, because a report has the details."""
    package = logging.getLogger("fd_dsa")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
