"""The model card: a template whose figures are those that the commands printed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .evalset import LENGTHS, PER_LENGTH, PER_TASK, TASK_LENGTHS, TASKS
from .reports import parity, selection
from .sources import Sources
from .tables import load

TEMPLATE = Path(__file__).resolve().parent / "card_template.md"
names = load("card")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def retrieval_table(rates: dict[str, dict]) -> str:
    """Plain needles by length and mode of attention."""
    modes = [m for m in names.modes if m in rates]
    rows = [[str(n), *(f"{_rate(rates[m], n):.3f}" for m in modes)] for n in LENGTHS]
    return table(["tokens", *(names.modes[m] for m in modes)], rows)


def _rate(rates: dict, length: int) -> float:
    return rates[str(length)]  # JSON has made the lengths strings


def tasks_table(results: dict) -> str:
    """The other tasks on long texts, top-256."""
    rows = [
        [names.tasks[t], *(f"{_rate(results[t]['top256'], n):.2f}" for n in TASK_LENGTHS)]
        for t in TASKS
    ]
    return table(["task", *(f"{n} tokens" for n in TASK_LENGTHS)], rows)


def chat_table(rates: dict) -> str:
    """Right answers by group of prompts."""
    return table(
        ["prompts", "right"],
        [[name, f"{rates[g][0]}/{rates[g][1]}"] for g, name in names.groups.items() if g in rates],
    )


def rules_of(rates: dict) -> str:
    """How many single rules were kept, and which kinds not always."""
    kinds: dict[str, list[int]] = {}
    for name, (good, total) in rates.items():
        group, _, kind = name.partition(".")
        if kind and group in ("instruction", "assignment"):
            sums = kinds.setdefault(kind, [0, 0])
            sums[0] += good
            sums[1] += total
    good, total = (sum(x[i] for x in kinds.values()) for i in (0, 1))
    missed = ", ".join(f"{k} {a}/{b}" for k, (a, b) in sorted(kinds.items()) if a < b)
    return f"{good} of {total} single rules were kept ({good / total:.1%}); not always: {missed}."


def selection_table(found: dict) -> str:
    """Needle recall and mass by layer."""
    layers = range(len(found["mass_256"]))
    rows = [
        [name.format(random=found["random_set_256"]), *(f"{found[key][i]:.3f}" for i in layers)]
        for key, name in names.selection.items()
    ]
    return table(["layer", *map(str, layers)], rows)


def parity_sentence(rows: list[dict]) -> str:
    """What `parity` found, in words."""
    worst, largest = (max(r[k] for r in rows) for k in ("difference", "largest_logit"))
    same = all(r["same_argmax"] for r in rows)
    lengths = ", ".join(str(r["length"]) for r in rows)
    return (
        f"logits of the trainer and of transformers in float32 on a CPU differ by at most "
        f"{worst:.1e} (logits up to {largest:.0f}) at {lengths} tokens, the most likely token is "
        f"{'equal everywhere' if same else 'NOT equal everywhere'}; at {rows[-1]['length']} tokens "
        f"dense attention would differ by {rows[-1]['dense_difference']:.1f}"
    )


def training_sentence(log: str) -> str:
    """Steps and tokens from the log of the training."""
    steps, tokens = re.findall(r"training done: (\d+) steps, ([\d.]+) M tokens", log)[-1]
    seconds = re.findall(r"of (\d+) s spent", log)[-1]
    return f"{int(steps):,} steps, {float(tokens) / 1000:.2f} billion tokens, {seconds} s of steps"


def write_card(model: str, tokenizer, sources: Sources, out: str | Path, texts: int = 16) -> None:
    """Fills the template from an exported folder with its results.json and train.log.

    Raises:
        FileNotFoundError: one of the two files is missing.
        KeyError: results.json lacks a mode or a task that the card shows.
    """
    folder = Path(model)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    weights = (folder / "model.safetensors").read_bytes()
    fields = {
        "bytes": f"{len(weights):,}",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "retrieval": retrieval_table(results["retrieval"]),
        "tasks": tasks_table(results),
        "chat": chat_table(results["chat"]),
        "rules": rules_of(results["chat"]),
        "selection": selection_table(selection(model, tokenizer, sources, texts)),
        "parity": parity_sentence(parity(model)),
        "training": training_sentence((folder / "train.log").read_text(encoding="utf-8")),
        "per_length": str(PER_LENGTH),
        "per_task": str(PER_TASK),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in fields.items():
        text = text.replace("{{" + name + "}}", value)
    Path(out).write_text(text, encoding="utf-8")
