"""Commands of the demo model's training; see README.md beside this file.

python tools/demo_training COMMAND --help
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # started as a folder: python tools/demo_training
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "demo_training"


def _tokenizer(folder: str):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def _sources(folder: str):
    from demo_training.sources import Sources, changed_files

    sources = Sources.load(folder)
    for name in changed_files(folder):
        print(f"--data: {name} is not the recorded version; results will differ", file=sys.stderr)
    return sources


def tokenizer(args: argparse.Namespace) -> None:
    """Trains the tokenizer and writes it."""
    from demo_training.tokenizer import characters_per_token, train_tokenizer, write_tokenizer

    sources = _sources(args.data)
    trained = train_tokenizer(sources, args.vocabulary)
    write_tokenizer(trained, args.out)
    rate = characters_per_token(trained, sources)
    print(f"{trained.get_vocab_size()} entries, {rate:.2f} characters a token, in {args.out}")


def evalset(args: argparse.Namespace) -> None:
    """Writes the fixed evaluation file."""
    from demo_training.evalset import build

    build(_sources(args.data), _tokenizer(args.tokenizer), args.out)
    print(f"{args.out}: {Path(args.out).stat().st_size} bytes")


def worker(args: argparse.Namespace) -> None:
    """Writes shards of packed rows (started by `train`)."""
    from demo_training.rows import write_shards

    plan = args.plan.split(",")
    write_shards(args.data, args.tokenizer, args.shards, args.seed, plan, args.rows)


def _start_workers(args: argparse.Namespace) -> list[subprocess.Popen]:
    """Data processes; each writes short and long shards in turn, then the rest short."""
    plan = ["short", "long"] * args.long_shards
    plan += ["short"] * max(0, args.short_shards - args.long_shards)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    common = [sys.executable, str(Path(__file__).resolve().parent), "worker", "--data", args.data]
    common += ["--tokenizer", args.tokenizer, "--shards", args.shards, "--plan", ",".join(plan)]
    common += ["--rows", str(args.rows)]
    return [
        subprocess.Popen([*common, "--seed", str(args.seed + i)], env=environment)
        for i in range(args.workers)
    ]


def train(args: argparse.Namespace) -> None:
    """Trains, exports, and evaluates what was exported."""
    started = time.time()
    for folder in (args.out, args.shards):
        Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(args.shards) / "stop").unlink(missing_ok=True)
    processes = _start_workers(args)
    from demo_training import checkpoint, training
    from demo_training.rows import LONG, SHORT, Pool

    log = training.open_log(Path(args.out) / "train.log")
    model = training.new_model(args.device, args.init)
    log(f"{sum(p.numel() for p in model.parameters())} parameters on {args.device}")
    settings = training.Settings(
        seconds=args.seconds,
        phases=tuple(float(x) for x in args.phases.split(",")),
        tokens=args.tokens,
        decay_from=args.decay_from,
        warm_up=args.warm_up,
    )
    settings.rates = {k: v * args.rate for k, v in settings.rates.items()}
    trainer = training.Trainer(settings, model, log)
    pools = {n: Pool(args.shards, k, args.device) for n, k in ((SHORT, "short"), (LONG, "long"))}
    words = _tokenizer(args.tokenizer)
    for pool in pools.values():
        pool.batch(1)
    log("the first shards are there")
    if args.speed:
        trainer.speeds(pools)
    trainer.run(pools, words, started)
    (Path(args.shards) / "stop").touch()
    for process in processes:
        process.terminate()
        process.wait()
    checkpoint.save(model, args.out)
    if args.parts:
        checkpoint.split(args.out, args.parts)
    log("saved")
    checkpoint.restore(model, checkpoint.export(model))  # evaluate the rounded weights
    _evaluate(args, model, words, log)


def _evaluate(args: argparse.Namespace, model, words, log) -> None:
    """All rates on the evaluation file; results.json and the samples."""
    import contextlib

    import torch

    from demo_training.evalset import read
    from demo_training.reports import all_rates
    from demo_training.training import write_results

    if not args.modes:
        return
    found, chats = read(args.evalset)
    gpu = model.embed.is_cuda
    precision = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
    with precision, torch.no_grad():
        results = all_rates(model, words, found, chats, args.modes.split(","), log)
    write_results(Path(args.parts or args.out) / "results.json", results)
    log("evaluated")


def evaluate(args: argparse.Namespace) -> None:
    """All rates of an exported folder."""
    from demo_training import checkpoint, training

    Path(args.out).mkdir(parents=True, exist_ok=True)
    model = checkpoint.load(args.model).to(args.device)
    _evaluate(args, model, _tokenizer(args.model), training.open_log(Path(args.out) / "eval.log"))


def parity(args: argparse.Namespace) -> None:
    """Prints the comparison with Hugging Face transformers."""
    from demo_training.reports import parity as compare

    for row in compare(args.model):
        print(row)


def selection(args: argparse.Namespace) -> None:
    """Prints needle and mass recall of the indexer by layer."""
    from demo_training.reports import selection as report

    rows = report(args.model, _tokenizer(args.model), _sources(args.data), args.texts)
    for name, values in rows.items():
        print(name, values)


def join(args: argparse.Namespace) -> None:
    """Puts the parts of a checkpoint together."""
    from demo_training.checkpoint import join as put_together

    put_together(args.parts, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo_training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    here = Path(__file__).resolve().parent

    def command(function, **flags) -> None:
        sub = commands.add_parser(function.__name__, help=function.__doc__)
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            if value is None:
                sub.add_argument(flag, required=True)
            elif value is False:
                sub.add_argument(flag, action="store_true")
            else:
                sub.add_argument(flag, default=value, type=type(value))
        sub.set_defaults(run=function)

    rates = {"evalset": str(here / "demo_eval.jsonl"), "modes": "dense,top256,top64,last256"}
    shards = {"data": None, "tokenizer": None, "shards": "/dev/shm/demo_shards", "rows": 2048}
    command(tokenizer, data=None, out=None, vocabulary=4096)
    command(evalset, data=None, tokenizer=None, out=str(here / "demo_eval.jsonl"))
    command(worker, **shards, seed=0, plan="short")
    sizes = {"short_shards": 24, "long_shards": 8, "workers": 8, "seed": 0, "tokens": 32768}
    times = {"seconds": 480.0, "phases": "40,15,10,35", "decay_from": 0.5, "warm_up": 100}
    places = {"out": None, "parts": "", "init": "", "device": "cuda", "rate": 1.0, "speed": False}
    command(train, **shards, **sizes, **times, **places, **rates)
    command(evaluate, model=None, out=None, parts="", device="cuda", **rates)
    command(parity, model=None)
    command(selection, model=None, data=None, texts=16)
    command(join, parts=None, out=None)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    args = _parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
