"""Measurements on an exported folder: parity with Hugging Face, selection, all rates."""

from __future__ import annotations

import torch

from . import checkpoint
from .attention import index_scores
from .config import ASSISTANT, BOS, USER
from .evalset import SAMPLES, TASKS
from .evaluate import answers, chat_rates, retrieval_rates
from .model import DemoModel
from .sources import Sources
from .synth import Generator
from .synth.retrieval import haystack

PARITY_LENGTHS = (17, 200, 255, 256, 257, 400)
TOP = (256, 128, 64)
DIGITS = 5


@torch.no_grad()
def parity(folder: str) -> list[dict]:
    """Logits of this model against Hugging Face transformers on the same folder, float32, CPU.

    Returns:
        For each length: the largest logit and difference, whether every most likely token agrees,
        and by how much dense attention differs (so that the test is known to see the selection).

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


def _needle_text(tokenizer, generator: Generator):
    """(ids up to the answer's digits, the digits' ids, position of the needle) or None."""
    p = generator.pieces
    value = str(p.between(10000, 99999))
    lines = haystack(p, 4600)
    lines.insert(p.between(0, len(lines) // 2), f"The pass key is {value}. Remember it.")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    text = "Read the text and answer the question.\n\n" + " ".join(lines)
    ids = [BOS, USER, *encode(text + "\n\nWhat is the pass key?")]
    ids += [ASSISTANT, *encode("The pass key is ")]
    digits = [encode(x)[0] for x in value]
    places = [i for i in range(len(ids) - DIGITS) if ids[i : i + DIGITS] == digits]
    return (ids, digits, places[0]) if len(places) == 1 and 1100 < len(ids) < 1700 else None


def _recording(found: list):
    """A dense attention that also keeps (scores [T, T], attention [H, T, T]) of every layer."""

    def attend(q, k, v, index_q, index_k, weights, topk):
        scores = index_scores(index_q, index_k, weights)
        i = torch.arange(q.shape[2])
        dots = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        attention = dots.masked_fill(i[None] > i[:, None], float("-inf")).softmax(-1)
        found.append((scores[0], attention[0]))
        return attention @ v, torch.zeros(())

    return attend


@torch.no_grad()
def selection(folder: str, tokenizer, sources: Sources, texts: int = 16) -> dict:
    """Whether the indexer finds a pass key, and how much attention its top-k holds, by layer.

    Queries are the five positions that predict the digits; the text has 1,100 to 1,700 tokens and
    the key is in its first half. Needle recall means something only in layers with a head that
    attends to the needle (row "strongest_head").
    """
    model, generator = checkpoint.load(folder), Generator(5151, sources)
    layers = len(model.layers)
    result = {f"{name}_{k}": [0.0] * layers for k in TOP for name in ("needle", "mass")}
    result |= {"strongest_head": [0.0] * layers, "random_set_256": 0.0}
    done = 0
    while done < texts:
        drawn = _needle_text(tokenizer, generator)
        if drawn is None:
            continue
        done += 1
        _add_selection(model, *drawn, result)
    result["random_set_256"] = round(result["random_set_256"] / texts, 3)
    for sums in result.values():
        if isinstance(sums, list):
            sums[:] = [round(x / (texts * DIGITS), 3) for x in sums]
    return result


def _add_selection(model: DemoModel, ids, digits, place: int, result: dict) -> None:
    """Adds the sums over the five digits of one text."""
    recorded: list = []
    functions = model.functions() | {"attend": _recording(recorded)}
    model(torch.tensor([ids + digits[:-1]]), mode="kl", functions=functions)
    result["random_set_256"] += 256 / len(ids)
    for layer, (scores, attention) in enumerate(recorded):
        for j in range(DIGITS):
            query, needle = len(ids) - 1 + j, place + j
            order = scores[query, : query + 1].argsort(descending=True)
            result["strongest_head"][layer] += float(attention[:, query, needle].max())
            mean = attention[:, query].mean(0)
            for k in TOP:
                result[f"needle_{k}"][layer] += float((order[:k] == needle).any())
                result[f"mass_{k}"][layer] += float(mean[order[:k]].sum())


RETRIEVAL_MODES = {
    "dense": {"mode": "dense"},
    "top256": {"mode": "sparse", "topk": 256},
    "top128": {"mode": "sparse", "topk": 128},
    "top64": {"mode": "sparse", "topk": 64},
    "last256": {"mode": "dense", "window": 256},
}


def all_rates(model: DemoModel, tokenizer, retrieval_items, chat_items, modes, log) -> dict:
    """Retrieval by mode and length, chat checks by group, and the answers that are only read."""
    results: dict = {}
    for task in ("", *TASKS):
        items = [x for x in retrieval_items if x.get("task", "") == task]
        results[task or "retrieval"] = found = {}
        for name in modes if items else ():
            found[name] = retrieval_rates(model, tokenizer, items, **RETRIEVAL_MODES[name])
            log(f"{task or 'retrieval'} {name} {found[name]}")
    rates, said = chat_rates(
        lambda conversations: answers(model, tokenizer, conversations, 260, rows=128), chat_items
    )
    results["chat"] = rates
    log("chat " + " ".join(f"{k} {a}/{b}" for k, (a, b) in rates.items()))
    results["answers"] = {x["id"]: a for x, a in zip(chat_items, said, strict=True)}
    for item, text in zip(chat_items, said, strict=True):
        if item["messages"][-1]["content"] in SAMPLES and not item["checks"]:
            log(f"  {item['messages'][-1]['content']!r} -> {text!r}")
    return results
