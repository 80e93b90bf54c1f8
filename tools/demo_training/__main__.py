"""Commands of the demo model's training, which README.md explains.

python tools/demo_training COMMAND --help
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # started as a folder: python tools/demo_training
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    __package__ = "demo_training"


def _sources(folder: str):
    from demo_training.sources import Sources, changed_files

    sources = Sources.load(folder)
    for name in changed_files(folder):
        print(f"--data: {name} is not the recorded version; results will differ", file=sys.stderr)
    return sources


def tokenizer(args: argparse.Namespace) -> None:
    """Train the tokenizer and writes it."""
    from demo_training.tokenizer import train_tokenizer, write_tokenizer

    sources = _sources(args.data)
    trained = train_tokenizer(sources)
    write_tokenizer(trained, args.out)
    print(f"{trained.get_vocab_size()} entries in {args.out}")


def worker(args: argparse.Namespace) -> None:
    """Write shards of packed rows (started by `all`)."""
    from demo_training.rows import write_shards

    write_shards(args.data, args.tokenizer, args.shards, args.seed, args.context, args.shard_tokens)


def _start_workers(args: argparse.Namespace, context: int, stage: int) -> list[subprocess.Popen]:
    """Start the data processes. Each stage has its own seeds."""
    shards = Path(args.shards)
    shards.mkdir(parents=True, exist_ok=True)
    (shards / "stop").unlink(missing_ok=True)
    for torn in shards.glob("unfinished_*"):
        torn.unlink()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    common = [sys.executable, str(Path(__file__).resolve().parent), "worker", "--data", args.data]
    common += ["--tokenizer", args.out, "--shards", args.shards, "--context", str(context)]
    common += ["--shard-tokens", str(args.shard_tokens)]
    seeds = (args.seed + 100 * stage + i for i in range(args.workers))
    return [subprocess.Popen([*common, "--seed", str(x)], env=environment) for x in seeds]


def _stop_workers(args: argparse.Namespace, processes: list[subprocess.Popen]) -> None:
    (Path(args.shards) / "stop").touch()
    for process in processes:
        process.terminate()
        process.wait()


def _train(args: argparse.Namespace, words, log, stop_at: float) -> bool:
    """Train, or continue a training. Returns True when the model is exported."""
    from demo_training import checkpoint, training
    from demo_training.config import CONFIGS
    from demo_training.rows import KINDS, Pool

    out = Path(args.out)
    settings = training.Settings(60.0 * args.minutes, tokens=args.tokens)
    model = training.new_model(args.device, CONFIGS[args.config])
    trainer = training.Trainer(settings, model, log)
    if (out / "state.pt").exists():
        trainer.resume(out / "state.pt")
    log(f"{sum(p.numel() for p in model.parameters())} parameters on {args.device}")
    log(f"from step {trainer.steps}, {trainer.spent:.0f} of {settings.seconds:.0f} s spent")
    processes = _start_workers(args, model.config["max_position_embeddings"], trainer.steps)
    try:
        pools = {k: Pool(args.shards, k, args.device) for k in KINDS}
        done = trainer.run(pools, words, stop_at, out / "state.pt")
    finally:
        _stop_workers(args, processes)
    if not done:
        trainer.save(out / "state.pt")
        log("saved the state; run the same command again")
        return False
    checkpoint.save(model, out)
    log("exported")
    return True


def all_steps(args: argparse.Namespace) -> None:
    """Make the tokenizer, train, export and evaluate. Finished parts are skipped."""
    from tokenizers import Tokenizer

    from demo_training import checkpoint, training

    started, out = time.time(), Path(args.out)
    stop_at = started + args.stop_after if args.stop_after else float("inf")
    out.mkdir(parents=True, exist_ok=True)
    log = training.open_log(out / "train.log")
    if not (out / "tokenizer.json").exists():
        tokenizer(args)
    words = Tokenizer.from_file(str(out / "tokenizer.json"))
    exported = (out / "model.safetensors").exists() or _train(args, words, log, stop_at)
    if exported and not (out / "results.json").exists():
        if stop_at - time.time() < args.evaluation_seconds:
            log("evaluation is left; run the same command again")
        else:
            _evaluate(args, checkpoint.load(out).to(args.device), words, log)


def _evaluate(args: argparse.Namespace, model, words, log) -> None:
    """Measure all rates on the evaluation file, and write results.json and the samples."""
    import contextlib

    import torch

    from demo_training.evalset import read
    from demo_training.reports import all_rates

    if not args.modes:
        return
    found, chats = read(args.evalset)
    gpu = model.embed.is_cuda
    precision = torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext()
    with precision, torch.no_grad():
        results = all_rates(model, words, found, chats, args.modes.split(","), log)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (Path(args.out) / "results.json").write_text(text, encoding="utf-8")
    log("evaluated")


def mtp(args: argparse.Namespace) -> None:
    """Train the layer for multi-token prediction on a frozen model, and writes it beside it."""
    import torch

    from demo_training import checkpoint
    from demo_training import mtp as layer

    torch.manual_seed(0)
    folder = Path(args.model)
    model = checkpoint.load(folder).to(args.device).requires_grad_(False)
    rows = layer.gather_rows(model, folder, args.data, args.workers, args.batches, print)
    predictor = layer.train(model, rows, 60.0 * args.minutes, print)
    layer.save(predictor, model.cpu(), folder)


def heldout(args: argparse.Namespace) -> None:
    """Ask a server the held-out prompts, writes what it answers, prints the counts."""
    from demo_training.heldout import ask_all, table

    result = ask_all(args.url, Path(args.evalset))
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    Path(args.out).write_text(text, encoding="utf-8")
    print(table({"right or rightly refused": result}))


def rates(args: argparse.Namespace) -> None:
    """Ask a server the evaluation file, writes its rates and answers, prints the rates."""
    from demo_training.evalset import read
    from demo_training.served import rates as of_server

    items, chats = read(args.evalset)
    items = [item for item in items if item["length"] <= args.longest]
    found = of_server(args.url, items, chats)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    Path(args.out).write_text(text, encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k != "answers"}, indent=1))


def parity(args: argparse.Namespace) -> None:
    """Print the comparison with Hugging Face transformers."""
    from demo_training.reports import parity as compare

    for row in compare(args.model):
        print(row)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo_training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    here = Path(__file__).resolve().parent

    def command(function, name: str = "", **flags) -> None:
        sub = commands.add_parser(name or function.__name__, help=function.__doc__)
        for flag_name, value in flags.items():
            flag = "--" + flag_name.replace("_", "-")
            if value is None:
                sub.add_argument(flag, required=True)
            else:
                sub.add_argument(flag, default=value, type=type(value))
        sub.set_defaults(run=function)

    chosen = {"evalset": str(here / "demo_eval.jsonl"), "modes": "dense,top256,top64,last256"}
    shards = {"shards": "/dev/shm/demo_shards", "shard_tokens": 1 << 20, "seed": 100}
    command(tokenizer, data=None, out=None)
    command(worker, data=None, tokenizer=None, context=8192, **shards)
    times = {"minutes": 24.0, "stop_after": 0.0, "evaluation_seconds": 150.0}
    places = {"out": None, "device": "cuda", "config": "demo"}
    sizes = {"workers": 8, "tokens": 32768}
    command(all_steps, "all", data=None, **places, **times, **sizes, **shards, **chosen)
    command(mtp, model=None, data="", minutes=12.0, device="cpu", workers=1, batches=1000)
    command(heldout, url=None, out=None, evalset=chosen["evalset"])
    command(rates, url=None, out=None, evalset=chosen["evalset"], longest=8192)
    command(parity, model=None)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    args = _parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
