"""IFEval of the demo model before and after two changes, paired prompt by prompt.

    python -m benchmarks.ifeval_pairs                # on a CPU; about an hour on two idle cores
    python -m benchmarks.ifeval_pairs --rig          # on a GPU, through the test plug-in
    python -m benchmarks.ifeval_pairs --subset 16 --out build/ifeval    # shows that it runs
    python -m benchmarks.ifeval_pairs --rig --answers-only    # a GPU machine without the checkers
    python -m benchmarks.ifeval_pairs --rig --score-only      # later, elsewhere; build/ is copied

The first pair makes a step's metadata in every layer, then once per step (FastDeploy #7367). The
second pair runs the indexer's projections on one stream, then on two (vLLM #39943). It runs on a
GPU only, because a CPU has one stream. All sides serve with FD_DSA_BATCH_INVARIANT=1. So an answer
does not depend on the batch, and a difference can only come from the change. Answers, scores and
the pages of `accuracy compare` stay in build/ifeval_pairs. A run continues there only on the kind
of machine and the commit that gave the first answers. Writes
benchmarks/results/accuracy/ifeval_pairs_cpu.json or ifeval_pairs_gpu.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS, ROOT, environment, parser_of, write_json, write_result

# name -> form of the server, and largest step in tokens that forks to a second stream
SIDES = {
    "every layer": ("every layer", None),
    "once per step": ("once", None),
    "one stream": ("once", "0"),
    "two streams": ("once", "100000"),
}
PAIRS = (("every layer", "once per step"), ("one stream", "two streams"))
CONCURRENCY = 64
ENVIRONMENT_FILE = "environment.json"
# fields of an environment that all answers of a result share
_SAME = ("cpu", "gpu", "commit", "dirty", "python", "paddlepaddle", "numpy", "triton")


@contextmanager
def _server(side: str, rig: bool, log: Path) -> Iterator[str]:
    """Yield the URL of a server in the form of a side. The server ends with the block."""
    form, most_tokens = SIDES[side]
    environ = os.environ | {"FD_DSA_FORM": form, "FD_DSA_BATCH_INVARIANT": "1"}
    if most_tokens is not None:
        environ["FD_DSA_OVERLAP_MAX_TOKENS"] = most_tokens
    if rig:
        environ.setdefault("FD_DSA_RIG", "real")
    command = [sys.executable, "-m", "benchmarks.workers.form_serve", "--port", "0"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environ
        ) as process,
    ):
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            urls = [word for word in words if word.startswith("http://")]
            if not urls:
                raise RuntimeError(f"{side}: the server did not start, see {log}")
            yield urls[0].rstrip("/")
        finally:
            process.terminate()


def _accuracy(*arguments: object) -> None:
    """Run a command of `fd_dsa.accuracy`."""
    command = [sys.executable, "-m", "fd_dsa.accuracy", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT)


def answer(side: str, folder: Path, rig: bool, subset: int | None) -> None:
    """Keep the answers of a side and the machine that gives them.

    Raises:
        SystemExit: the folder has answers of another machine or commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, env = folder / ENVIRONMENT_FILE, environment()
    if path.exists():
        require_same(folder, json.loads(path.read_text()), env)
    else:
        # before the first answer, because an interrupted run keeps its answers too
        write_json(path, env)
    with _server(side, rig, folder / "server.log") as url:
        flags = ["--subset", subset] if subset else []
        flags += ["--concurrency", CONCURRENCY, "--base-url", f"{url}/v1", "--out", folder]
        _accuracy("ifeval", "--answers-only", *flags)


def require_same(folder: Path, known: Mapping[str, Any], env: Mapping[str, Any]) -> None:
    """Check that answers come from one kind of machine and one commit.

    Args:
        folder: answers of a side.
        known: environment of these answers.
        env: environment of the answers that join them.

    Raises:
        SystemExit: the two differ; the message names the fields.
    """
    differing = [
        f"{key}: {known.get(key)} there, {env.get(key)} here"
        for key in _SAME
        if known.get(key) != env.get(key)
    ]
    if differing:
        raise SystemExit(
            f"{folder}: the answers come from another machine or commit ({'; '.join(differing)}); "
            "continue with that one, or remove the folder"
        )


def compared(before: Path, after: Path, out: Path) -> dict[str, Any]:
    """Return the paired verdict of two sides."""
    _accuracy("compare", before, after, "--out", out)
    found = json.loads((out / "compare.json").read_text())
    return {key: found[key] for key in ("verdict", "prompts", "answers", "metrics", "flips")}


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, score and compare all sides, and write the result. Returns 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--rig", action="store_true", help="on a GPU, by the test plug-in")
    parser.add_argument("--subset", type=int, metavar="N", help="N prompts only")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "accuracy", help="folder of the result"
    )
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--answers-only", action="store_true", help="keep the answers unscored")
    half.add_argument("--score-only", action="store_true", help="score the kept answers")
    args = parser.parse_args(argv)
    name = f"ifeval_pairs_{'gpu' if args.rig else 'cpu'}"
    folder = ROOT / "build" / name / (str(args.subset) if args.subset else "all")
    pairs = PAIRS if args.rig else PAIRS[:1]
    folders = {side: folder / side.replace(" ", "_") for pair in pairs for side in pair}
    if not args.score_only:
        for side, own in folders.items():
            answer(side, own, args.rig, args.subset)
    if args.answers_only:
        return 0
    envs = {own: json.loads((own / ENVIRONMENT_FILE).read_text()) for own in folders.values()}
    env = next(iter(envs.values()))
    for own, other in envs.items():
        require_same(own, other, env)
    result: dict[str, Any] = {"name": name, "env": env, "model": "demo_model"}
    result |= {"tier": "T1p" if args.rig else "T0", "subset": args.subset, "pairs": []}
    for own in folders.values():
        _accuracy("score", own)
    for before, after in pairs:
        sides = [folders[before], folders[after]]
        pair = {"before": before, "after": after}
        pair |= compared(*sides, folder / f"{sides[0].name}-{sides[1].name}")
        result["pairs"].append(pair)
        print(f"{before} -> {after}: {pair['verdict'][0]}", flush=True)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
