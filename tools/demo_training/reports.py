"""Measurements on an exported folder: parity with Hugging Face, all rates."""

from __future__ import annotations

import torch

from . import checkpoint
from .evalset import SAMPLES, TASKS
from .evaluate import answers, retrieval_rates
from .model import DemoModel
from .synth import chat_counts

PARITY_LENGTHS = (17, 200, 255, 256, 257, 400)


@torch.no_grad()
def parity(folder: str) -> list[dict]:
    """Compare the logits with Hugging Face transformers on one folder, float32, CPU.

    Returns:
        For each length the largest logit, the largest difference, and True if every most likely
        token agrees. The difference of dense attention shows that the test sees the selection.

    Raises:
        ValueError: transformers reports missing or unexpected tensors.
    """
    from transformers import AutoModelForCausalLM

    ours = checkpoint.load(folder)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    strange = {k: v for k, v in info.items() if v}
    if strange:
        raise ValueError(f"parity: {folder} does not load cleanly in transformers: {strange}")
    torch.manual_seed(1)
    rows, topk = [], ours.config["index_topk"]
    for length in PARITY_LENGTHS:
        ids = torch.randint(6, ours.config["vocab_size"], (1, length))
        sparse, dense = ours.logits(ids, mode="sparse", topk=topk), ours.logits(ids)
        reference = theirs(ids).logits
        same = (sparse.argmax(-1) == reference.argmax(-1)).all()
        rows.append(
            {
                "length": length,
                "largest_logit": float(reference.abs().max()),
                "difference": float((sparse - reference).abs().max()),
                "same_argmax": bool(same),
                "dense_difference": float((dense - reference).abs().max()),
            }
        )
    return rows


RETRIEVAL_MODES = {
    "dense": {"mode": "dense"},
    "top256": {"mode": "sparse", "topk": 256},
    "top64": {"mode": "sparse", "topk": 64},
    "last256": {"mode": "dense", "window": 256},
}


def all_rates(model: DemoModel, tokenizer, retrieval_items, chat_items, modes, log) -> dict:
    """Return retrieval by mode and length, chat checks by group, and unchecked answers."""
    results: dict = {}
    for task in ("", *TASKS):
        items = [x for x in retrieval_items if x.get("task", "") == task]
        results[task or "retrieval"] = found = {}
        for name in modes if items else ():
            found[name] = retrieval_rates(model, tokenizer, items, **RETRIEVAL_MODES[name])
            log(f"{task or 'retrieval'} {name} {found[name]}")
    conversations = [[(m["role"], m["content"]) for m in x["messages"]] for x in chat_items]
    said = answers(model, tokenizer, conversations, 260, rows=128)
    results["chat"] = rates = chat_counts(chat_items, said)
    log("chat " + " ".join(f"{k} {a}/{b}" for k, (a, b) in rates.items()))
    results["answers"] = {x["id"]: a for x, a in zip(chat_items, said, strict=True)}
    for item, text in zip(chat_items, said, strict=True):
        if item["messages"][-1]["content"] in SAMPLES and not item["checks"]:
            log(f"  {item['messages'][-1]['content']!r} -> {text!r}")
    return results
