"""Check fd_dsa inside a real FastDeploy: `python -m tools.fastdeploy_check [MODEL] [flags]`.

Without MODEL a tiny random model is made, which one GPU serves. Unknown flags, and arguments after
`--`, go to `python -m fd_dsa.serve --engine fastdeploy`. The tool reports versions, the serving
path, and each thing that the plug-in looks for. Then three checks start their own servers. A check
that fails does not stop the others.

- smoke: one server with our plug-in answers a completion and a chat, whole and streamed.
- parity: FastDeploy's own DSA path and ours give the same tokens for the same prompts.
- step_time: decode steps of both paths alternately in one run, as a ratio.

parity and step_time run both paths as in FastDeploy's own recipe. Prompts are in one piece (give a
--max-num-batched-tokens of at least --max-model-len), without prefix caching. Our path has the
indexer's RoPE in FastDeploy's pairing. The results so far are always written: a page of Markdown
for an issue, and a JSON file with all figures. Exit status: 0 all passed, 1 a check failed, 2 it
cannot run, without FastDeploy or with a path that would not serve.
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
from fd_dsa.fastdeploy_plugin.launch.choice import require_fastdeploy
from fd_dsa.fastdeploy_plugin.launch.start import passed_values
from fd_dsa.serve.flag_sources import parse_args
from tools.fastdeploy_check import parity, step_time
from tools.fastdeploy_check.report import as_markdown, body
from tools.fastdeploy_check.servers import (
    OURS,
    PATHS,
    UPSTREAM,
    CheckFailed,
    logged,
    machine,
    serving,
    which_path,
)
from tools.fastdeploy_check.tiny import FLAGS, write_tiny_model

CHECKS = ("smoke", "parity", "step_time")
_PASSED, _WRONG, _IMPOSSIBLE = 0, 1, 2
# what FastDeploy's own path needs to be right
_RECIPE = ("--no-enable-prefix-caching", "--enable-logprob")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options, serve = _parse(argv)
    try:
        require_fastdeploy()
        serve = _with_model(serve, options.log_folder)
        paths = {path: which_path(path) for path in PATHS}
    except FdDsaError as error:
        print(f"fastdeploy_check: {error}", file=sys.stderr)
        return _IMPOSSIBLE
    options.variables = {path: found["variables"] for path, found in paths.items()}
    env = machine(argv, paths)
    result: dict[str, Any] = {"name": "fastdeploy_check", "passed": False, "env": env}
    refusals = [found["error"] for found in paths.values() if found["error"]]
    for check in options.only:
        _write(options, result)
        print(f"{check} ...", flush=True)
        result[check] = _outcome(check, options, serve, refusals)
        print("\n".join(f"  {line}" for line in body(check, result[check])), flush=True)
    result["passed"] = all(result[check]["passed"] for check in options.only)
    result["log"] = logged(options.log_folder)
    _write(options, result)
    words = "all passed" if result["passed"] else "NOT passed"
    print(f"{words}; for an issue: {options.report}, all figures: {options.out}")
    if refusals:
        return _IMPOSSIBLE
    return _PASSED if result["passed"] else _WRONG


def _outcome(
    check: str, options: argparse.Namespace, serve: list[str], refusals: list[str]
) -> dict[str, Any]:
    """Run a check. An error in it does not stop the other checks."""
    if refusals:
        return {"passed": False, "error": f"not run: {refusals[0]}"}
    try:
        return _RUN[check](options, serve)
    except Exception as error:
        name = "" if isinstance(error, (CheckFailed, FdDsaError)) else f"{type(error).__name__}: "
        return {"passed": False, "error": f"{name}{error}"}


def _write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write both files with the results so far."""
    write_json(options.out, result)
    options.report.write_text(as_markdown(result, options.only), "utf-8")


def _with_model(serve: list[str], folder: Path) -> list[str]:
    """Return server arguments with a model, which is a tiny random one by default.

    Raises:
        ConfigError: a flag that neither this tool nor the server has.
    """
    args = parse_args(serve)
    if "model" in args.given or "model" in passed_values(args.passed):
        return serve
    model = write_tiny_model(folder / "tiny_model")
    print(f"no MODEL: a random one of three layers, {model}")
    return [str(model), *FLAGS, *serve]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this tool, and the arguments for the server."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fastdeploy_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("fastdeploy_check.json"))
    parser.add_argument("--report", type=Path, default=Path("fastdeploy_check.md"))
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


def _serving(path: str, options: argparse.Namespace, serve: list[str]) -> Any:
    """Run a server as in FastDeploy's recipe: prompts in one piece, no prefix caching."""
    flags = [*serve, *([] if "--" in serve else ["--"]), *_RECIPE]
    variables = options.variables[path] | {"FD_DISABLE_CHUNKED_PREFILL": "1"}
    return serving(path, flags, options.log_folder, variables)


def _smoke(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Ask our path with default settings: a completion and a chat, whole and streamed.

    Raises:
        CheckFailed: an answer is missing, empty, or another when it is streamed.
    """
    greedy, prompt = {"max_tokens": 16, "temperature": 0}, "The capital of France is"
    with serving(OURS, serve, options.log_folder, options.variables[OURS]) as server:
        route = "/v1/completions"
        whole = server.post(route, prompt=prompt, **greedy)["choices"][0]["text"]
        events = server.stream(route, prompt=prompt, **greedy)
        streamed = "".join(event["choices"][0].get("text") or "" for event in events)
        if not whole:
            raise CheckFailed(f"{route}: the text is empty")
        if streamed != whole:
            raise CheckFailed(f"{route}: streamed {streamed!r}, whole {whole!r}")
        messages = [{"role": "user", "content": "Hello! What can you do?"}]
        answer = server.post("/v1/chat/completions", messages=messages, **greedy)
        content = answer["choices"][0]["message"]["content"]
    if not content:
        raise CheckFailed("/v1/chat/completions: the answer is empty")
    return {"passed": True, "completion": whole, "chat": content}


def _parity(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Run both paths, in order."""
    answers = {}
    for path in PATHS:
        with _serving(path, options, serve) as server:
            answers[path] = [parity.answer(server, text) for text in parity.prompts()]
    pairs = zip(answers[OURS], answers[UPSTREAM], strict=True)
    found = [parity.compare(ours, theirs, options.margin) for ours, theirs in pairs]
    return {"passed": all(one["passed"] for one in found), "margin": options.margin, "cases": found}


def _step_time(options: argparse.Namespace, serve: list[str]) -> dict[str, Any]:
    """Run both paths alternately. Each begins every second round."""
    rounds = []
    for number in range(options.rounds):
        for path in PATHS if number % 2 == 0 else PATHS[::-1]:
            with _serving(path, options, serve) as server:
                # the first answers are slower
                step_time.gaps_us(server, options.batches[0], tokens=16)
                gaps = {batch: step_time.gaps_us(server, batch) for batch in options.batches}
                rounds.append((path, gaps))
    return {"passed": True, "entries": step_time.report(rounds)}


_RUN = {"smoke": _smoke, "parity": _parity, "step_time": _step_time}


if __name__ == "__main__":
    sys.exit(main())
