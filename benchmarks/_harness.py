"""The harness of all benchmarks: flags, environment, statistics, workers, results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Process = TypeVar("Process", bound="Answering")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_VARIABLE = "FD_DSA_LIMIT_S"
"""Names the seconds that `gpu_run` gives a section."""
OUT_OF_TIME = 75
"""Exit status of a section that ended itself with work left; EX_TEMPFAIL of sysexits.h."""
# files that determine a result
_MEASURED = ("fd_dsa", "benchmarks", ":!benchmarks/results")
_PACKAGES = ("paddlepaddle", "triton", "numpy", "torch", "transformers")


def _git(*args: str, root: Path) -> str:
    """Return the output of a git command in a repository, or "" without git."""
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    """Return an installed version, or "" without the package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def gpu_state(*fields: str) -> dict[str, str]:
    """Return fields of the first GPU that this process sees, "" for each without nvidia-smi."""
    # imported late, because a worker may have another checkout's package
    from fd_dsa.environment import has_nvidia_gpu, nvidia_smi

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    found = nvidia_smi(",".join(fields), first) if has_nvidia_gpu() else []
    values = found[0].split(", ") if found else [""] * len(fields)
    return dict(zip(fields, values, strict=True))


def _gpu() -> dict[str, str]:
    """Return name and driver of the first GPU, or "" for both if this process sees no GPU."""
    found = gpu_state("name", "driver_version")
    return {"gpu": found["name"], "driver": found["driver_version"]}


def revision_of(checkout: Path = ROOT, paths: Sequence[str] = ("fd_dsa",)) -> dict[str, Any]:
    """Return the commit of a checkout, and whether the measured files differ from it.

    A copy without git counts as dirty.
    """
    commit = _git("rev-parse", "HEAD", root=checkout)
    changed = _git("status", "--porcelain", "--", *paths, root=checkout)
    return {"commit": commit, "dirty": bool(changed) or not commit}


def environment() -> dict[str, Any]:
    """Return machine, versions and commit of a result.

    A copy without git has its commit in FD_DSA_COMMIT: the hash, and -dirty if it differs.
    """
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    commit = os.environ.get("FD_DSA_COMMIT", "")
    revision = {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": model[1] if model else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        **_gpu(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **(revision if commit else revision_of(paths=_MEASURED)),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the percentiles 20, 50 and 80."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def write_json(path: Path, result: Any) -> None:
    """Write a result so that a reader never finds half a file. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser whose description is the first line of a module's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def out_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser with the flag --out, the folder of the result."""
    parser = parser_of(doc)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser


def rig_parser(
    doc: str | None, *, is_dry: bool = True, is_split: bool = False
) -> argparse.ArgumentParser:
    """Make a parser with the flags of benchmarks that run on the test plug-in.

    Args:
        doc: docstring of the benchmark's module.
        is_dry: True to add --dry.
        is_split: True to add --tensor-parallel-size.
    """
    parser = out_parser(doc)
    parser.add_argument(
        "--rig", action="store_true", help="Paddle's CPU wheel and the test plug-in"
    )
    if is_dry:
        parser.add_argument("--dry", action="store_true", help="small widths on the CPU")
    if is_split:
        parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, metavar="N")
    return parser


def rig_result(name: str, args: argparse.Namespace, **fields: Any) -> dict[str, Any]:
    """Return a result without cases, for the flags of `rig_parser`."""
    tier = "dry" if getattr(args, "dry", False) else "T1p" if args.rig else "T2"
    return {"name": name, "env": environment(), "tier": tier, "cases": [], **fields}


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a result to <its name>.json in a folder, and print where."""
    path = folder / f"{result['name']}.json"
    write_json(path, result)
    print(f"written: {path}", flush=True)


def save(name: str, result: Mapping[str, Any]) -> None:
    """Write a result of a CPU, with the environment, to benchmarks/results."""
    write_result(RESULTS, {"name": name, "env": environment(), "tier": "T0", **result})


def compare_packages(
    name: str,
    description: str | None,
    measure: Callable[[dict[str, Path], int], dict[str, Any]],
    rounds: int,
    argv: Sequence[str] | None = None,
) -> int:
    """Run the command of a CPU benchmark that may compare two packages. Returns 0.

    Its flags are --baseline CHECKOUT and --rounds N.

    Args:
        name: name of the result.
        description: its module's docstring.
        measure: makes the result of label -> checkout, "fd_dsa" for this one and "before" for the
            other, and of the rounds.
        rounds: default of --rounds.
    """
    parser = parser_of(description)
    parser.add_argument("--baseline", type=Path, help="checkout that is measured as well")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"rounds": args.rounds}
    checkouts = {"fd_dsa": ROOT}
    if args.baseline:
        checkouts["before"] = args.baseline.resolve()
        result["baseline"] = revision_of(args.baseline)
    save(name, result | measure(checkouts, args.rounds))
    return 0


def three_digits(value: float) -> str:
    """Format a figure with three significant digits, without powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def case_line(entry: Mapping[str, Any]) -> str:
    """Return a line for a case of a benchmark."""
    times = "  ".join(f"{label} {t['p50']:.2f}" for label, t in entry["times"].items())
    ratios = "  ".join(f"x{ratio:.2f} of {label}" for label, ratio in entry["ratios"].items())
    return f"{entry['case']:<34} us: {times} | {ratios} | {entry['percent_of_floor']:.0f}% of floor"


def table_row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, whose first row is its head."""
    head, *lines = map(table_row, rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines]) + "\n"


def peer_command(peer: Path, script: str, *arguments: str | Path) -> list[str]:
    """Return what runs a script of `workers` with a peer's packages: the `run.sh` of its folder."""
    worker = Path(__file__).parent / "workers" / script
    return ["bash", str(peer.resolve() / "run.sh"), "python", str(worker), *map(str, arguments)]


def run_peer(peer: Path, script: str, *arguments: str | Path) -> None:
    """Run a script of `workers` with a peer's packages."""
    subprocess.run(peer_command(peer, script, *arguments), check=True)


def random_prompts(requests: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return random token ids of `requests` prompts, without special tokens."""
    rng = np.random.default_rng(seed)
    return rng.integers(10, vocab_size, (requests, tokens)).tolist()


@contextlib.contextmanager
def on_cpus(cpus: Iterable[int]) -> Iterator[None]:
    """Start processes of the block on these processors only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Answering:
    """A process that answers each JSON line with a JSON line, and is idle between calls.

    Args:
        command: starts it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self: Process) -> Process:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def call(self, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the process ended.
        """
        assert self._process.stdin and self._process.stdout
        # a worker that has ended gives no line
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Worker(Answering):
    """A process with this project's code.

    Candidate and baseline each get one, so that their thread pools never meet in a process.

    Args:
        target: a module, whose functions answer, or "module:Class", an object of which does.
        checkout: whose `fd_dsa` it imports; the worker itself is always the one of this tree.
        cpus: processors that it runs on; None = all.
        options: arguments of the class.
    """

    def __init__(
        self,
        target: str,
        *,
        checkout: Path = ROOT,
        cpus: Iterable[int] | None = None,
        **options: Any,
    ) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.workers"]
        command += [str(checkout.resolve()), target, json.dumps(options)]
        with on_cpus(os.sched_getaffinity(0) if cpus is None else cpus):
            super().__init__(command)


@contextlib.contextmanager
def workers(
    target: str, checkouts: Mapping[str, Path], **options: Any
) -> Iterator[dict[str, Worker]]:
    """Yield a worker with the package of each checkout, by label."""
    with contextlib.ExitStack() as stack:
        yield {
            label: stack.enter_context(Worker(target, checkout=path, **options))
            for label, path in checkouts.items()
        }


def in_turns(
    calls: Mapping[Key, Callable[..., Any]], rounds: int, *, seeded: bool = False
) -> dict[Key, list[Any]]:
    """Call functions in turn, and return the results of each by key.

    Args:
        seeded: every call gets the number of its round as `seed`, and a further round, number 0,
            warms up.
    """
    results: dict[Key, list[Any]] = {key: [] for key in calls}
    for number in range(1 - seeded, rounds + 1):
        for key, call in calls.items():
            result = call(seed=number) if seeded else call()
            if number:
                results[key].append(result)
    return results


def serve_requests(target: Any) -> None:
    """Answer the requests of `Worker.call`, in the worker's process.

    Args:
        target: a module or an object; `op` of a request names one of its functions, the rest are
            the arguments.
    """
    answers = os.fdopen(os.dup(1), "w")
    # output of a library must not get between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(target, request.pop("op"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
