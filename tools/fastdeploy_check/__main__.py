"""Check fd_dsa inside a real FastDeploy: `python -m tools.fastdeploy_check MODEL [flags]`.

Flags that are not below, and all that stands after `--`, go to `python -m fd_dsa.serve --engine
fastdeploy`. Three checks, each of which starts servers of its own:

smoke      one server with our plug-in answers a completion and a chat, whole and streamed
parity     the same prompts through FastDeploy's own DSA path and ours: the same tokens
step_time  decode steps of both paths by turns in one run, as a ratio

parity and step_time run both paths with what FastDeploy's own recipe needs: prompts in one piece
(give a --max-num-batched-tokens that is not below --max-model-len), no prefix caching; ours with
the indexer's RoPE in FastDeploy's pairing. The result is written to a
JSON file as far as it has come. Exit status: 0 all passed, 1 something is wrong, 2 it cannot run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._harness import write_json
from fd_dsa.errors import FdDsaError
from fd_dsa.fastdeploy_plugin.launch.choice import INSTALL, fastdeploy_is_installed
from tools.fastdeploy_check import parity, smoke, step_time
from tools.fastdeploy_check.servers import (
    OURS,
    PATHS,
    UPSTREAM,
    CheckFailed,
    machine,
    serving,
    which_path,
)

CHECKS = ("smoke", "parity", "step_time")
_PASSED, _WRONG, _IMPOSSIBLE = 0, 1, 2
# what FastDeploy's own path needs to be right
_RECIPE = ("--no-enable-prefix-caching", "--enable-logprob")
_ONE_PIECE = {"FD_DISABLE_CHUNKED_PREFILL": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, serve = _parse(argv)
    if not fastdeploy_is_installed():
        print(
            f"fastdeploy_check: FastDeploy is not installed in this Python; {INSTALL}",
            file=sys.stderr,
        )
        return _IMPOSSIBLE
    result: dict[str, Any] = {"name": "fastdeploy_check", "passed": False}
    try:
        paths = {path: which_path(path) for path in PATHS}
        result["env"] = machine(argv, paths)
        for check in options.only:
            print(f"{check} ...", flush=True)
            result[check] = _RUN[check](options, serve)
            write_json(options.out, result)
    except (CheckFailed, FdDsaError) as error:
        result["error"] = str(error)
        write_json(options.out, result)
        print(f"fastdeploy_check: {error}", file=sys.stderr)
        return _WRONG if "env" in result else _IMPOSSIBLE
    result["passed"] = all(result[check]["passed"] for check in options.only)
    write_json(options.out, result)
    print(f"{'all passed' if result['passed'] else 'NOT passed'}; {options.out}")
    return _PASSED if result["passed"] else _WRONG


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of this tool, and the arguments for the server."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fastdeploy_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("fastdeploy_check.json"))
    parser.add_argument("--only", action="append", choices=CHECKS, help="may be repeated")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each path for step_time")
    parser.add_argument("--batches", default=",".join(map(str, step_time.BATCHES)))
    parser.add_argument("--margin", type=float, default=parity.MARGIN)
    parser.add_argument("--log-folder", type=Path, help="default: a new one below /tmp")
    place = argv.index("--") if "--" in argv else len(argv)
    options, serve = parser.parse_known_args(argv[:place])
    options.only = options.only or list(CHECKS)
    options.batches = [int(batch) for batch in options.batches.split(",")]
    if options.log_folder is None:
        options.log_folder = Path(tempfile.mkdtemp(prefix="fastdeploy_check-"))
    options.log_folder.mkdir(parents=True, exist_ok=True)
    return options, [*serve, *argv[place:]]


def _as_recipe(serve: Sequence[str]) -> list[str]:
    """Server arguments with those of FastDeploy's recipe after `--`."""
    return [*serve, *([] if "--" in serve else ["--"]), *_RECIPE]


def _smoke(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Our path with the defaults that users get."""
    with serving(OURS, serve, options.log_folder) as server:
        found = smoke.smoke(server)
    print(f"  completion {found['completion']!r}\n  chat {found['chat']!r}")
    return {"passed": True, **found}


def _parity(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Both paths, one after the other."""
    texts, answers = parity.prompts(), {}
    for path in PATHS:
        with serving(path, _as_recipe(serve), options.log_folder, _ONE_PIECE) as server:
            answers[path] = parity.outputs(server, texts)
    pairs = zip(answers[OURS], answers[UPSTREAM], strict=True)
    found = [parity.compare(ours, theirs, options.margin) for ours, theirs in pairs]
    for text, one in zip(texts, found, strict=True):
        mark = "ok" if one["passed"] else "DIFFERENT"
        print(
            f"  {len(text):>6} characters: {one['same']} of {one['tokens']} tokens the same, "
            f"gap {one['gap']}  {mark}"
        )
    return {"passed": all(one["passed"] for one in found), "margin": options.margin, "cases": found}


def _step_time(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Both paths by turns: the one that begins changes from round to round."""
    rounds = []
    for number in range(options.rounds):
        for path in PATHS if number % 2 == 0 else PATHS[::-1]:
            with serving(path, _as_recipe(serve), options.log_folder, _ONE_PIECE) as server:
                rounds.append((path, step_time.measure(server, options.batches)))
    found = step_time.report(rounds)
    for entry in found:
        us = {side: entry[side]["us"]["p50"] for side in ("baseline", "candidate")}
        print(
            f"  batch {entry['case']['batch']:>3}: FastDeploy {us['baseline'] / 1e3:.2f} ms, "
            f"fd_dsa {us['candidate'] / 1e3:.2f} ms, ratio {entry['ratio_p50']:.3f}"
        )
    return {"passed": True, "entries": found}


_RUN = {"smoke": _smoke, "parity": _parity, "step_time": _step_time}


if __name__ == "__main__":
    sys.exit(main())
