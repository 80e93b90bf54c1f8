"""Greedy answers and retrieval rates of a model, without a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .attention import rms_norm
from .config import EOS, PAD
from .model import DemoModel
from .rows import conversation_ids

BLOCK = 64  # rows are padded to multiples of this, so that few shapes occur


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _head(model: DemoModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return most likely next token of each hidden state."""
    return F.linear(rms_norm(hidden, model.norm), model.head).float().argmax(-1)


@torch.no_grad()
def answers(
    model: DemoModel,
    tokenizer,
    conversations,
    limit: int = 200,
    mode: str = "sparse",
    rows: int = 64,
) -> list[str]:
    """Return greedy answers of at most `limit` tokens to conversations [(role, text)].

    Right-padded rows, each read at its own last position; recomputes the whole row at every step.
    """
    encoded = [conversation_ids(tokenizer, c) for c in conversations]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    found = [""] * len(encoded)
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        outputs = _answer_rows(model, [encoded[i] for i in chosen], limit, mode)
        for i, ids in zip(chosen, outputs, strict=True):
            found[i] = tokenizer.decode(ids, skip_special_tokens=False)
    return found


def _answer_rows(model: DemoModel, prompts: list[list[int]], limit: int, mode: str):
    """Return greedy continuations of a batch of prompts."""
    device, topk = model.embed.device, model.config["index_topk"]
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    first, rows = lengths.clone(), torch.arange(len(prompts), device=device)
    longest = max(map(len, prompts))
    buffer = torch.full((len(prompts), _padded(longest + limit)), PAD, device=device)
    for row, prompt in enumerate(prompts):
        buffer[row, : len(prompt)] = torch.tensor(prompt, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(limit):
        length = _padded(longest + step)
        how = mode if length > topk else "dense"
        hidden = model(buffer[:, :length], mode=how, topk=topk).hidden
        hidden = hidden.view(len(prompts), length, -1)[rows, lengths - 1]
        token = _head(model, hidden)
        done |= token == EOS
        if step % 8 == 0 and bool(done.all()):
            break
        buffer[rows, lengths] = torch.where(done, torch.full_like(token, PAD), token)
        lengths = torch.where(done, lengths, lengths + 1)
    return [buffer[r, int(first[r]) : int(lengths[r])].tolist() for r in range(len(prompts))]


@torch.no_grad()
def retrieval_rates(
    model: DemoModel, tokenizer, items: list[dict], mode: str, topk: int = 0, window: int = 0
) -> dict[int, float]:
    """Return share of items, by length, whose whole answer and end token are the most likely ones.

    Args:
        items: retrieval items of evalset.read.
        mode: "dense" or "sparse" (then with `topk`); window > 0 is the control that sees only the
            last `window` tokens.
    """
    rates = {}
    for length in sorted({x["length"] for x in items}):
        group = [x for x in items if x["length"] == length]
        rows = max(2, min(32, 16384 // length))
        right = 0
        for start in range(0, len(group), rows):
            batch = [_question_ids(tokenizer, x) for x in group[start : start + rows]]
            right += _right(model, batch, mode, topk, window)
        rates[length] = round(right / len(group), 3)
    return rates


def _question_ids(tokenizer, item: dict) -> tuple[list[int], int]:
    """Return the ids of prompt, answer and end token, and the length of the last two."""
    prompt = conversation_ids(tokenizer, [("user", item["prompt"])])
    answer = [*tokenizer.encode(item["answer"], add_special_tokens=False).ids, EOS]
    return prompt + answer, len(answer)


def _right(model: DemoModel, batch, mode: str, topk: int, window: int) -> int:
    """Count the rows that predict every token of their answer."""
    length = _padded(max(len(ids) for ids, _ in batch))
    ids = torch.full((len(batch), length), PAD, device=model.embed.device)
    for row, (tokens, _) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    hidden = model(ids, mode=mode, topk=topk, window=window).hidden.view(len(batch), length, -1)
    right = 0
    for row, (tokens, count) in enumerate(batch):
        end = len(tokens)
        predicted = _head(model, hidden[row, end - count - 1 : end - 1])
        right += bool((predicted == ids[row, end - count : end]).all())
    return right
