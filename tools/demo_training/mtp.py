"""The demo model's layer for multi-token prediction: trained on the frozen model, kept in FP8.

For the token at position i the layer gets the model's hidden state of i after its last norm, and
token i + 1. It learns the model's own distribution of token i + 2, right or wrong. It starts as a
copy of the model's last layer. A second pass over its own hidden states teaches it further drafts.
Rows are documents of the generators, half of them with the model's own answers, since those are
what it drafts when served.

Source: DeepSeek-V3 (arXiv 2412.19437) section 2.2.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from . import checkpoint
from .attention import rms_norm
from .config import ASSISTANT, EOS, PAD
from .model import DemoModel, expert_block
from .optimiser import Muon
from .rows import TRAINED, encode, pack
from .sources import Sources
from .synth import Generator

FILE = "mtp.safetensors"
LENGTH = 256  # of a row: up to here nothing is selected, so the indexer keeps its weights
LONGEST_PROMPT = 96  # of those that the model answers itself
BATCH = {"cpu": 4, "cuda": 64}  # rows of a step
BLOCK, LARGEST = 128, 448.0  # of FP8: rows and columns with one scale, and e4m3's largest value
QUANTISED = {
    *("q_a", "q_b", "kv_a", "kv_b", "o", "wq_b", "wk"),
    *("sg", "su", "sd", "eg", "eu", "ed"),
}
PROSE = (
    "The old miller walked along the river and looked at the grey clouds. A boy with a bucket "
    "came down the path to fetch water. The miller asked where his sister hides today. The boy "
    "laughed and pointed at the tall tree by the house. "
)


class Predictor(nn.Module):
    """The MTP layer. Embedding, head and rotation are the model's."""

    def __init__(self, model: DemoModel):
        super().__init__()
        hidden = model.config["hidden_size"]
        copies = {name: weight.detach().clone() for name, weight in model.layers[-1].items()}
        self.layer = nn.ParameterDict({n: nn.Parameter(w) for n, w in copies.items()})
        self.register_buffer("bias", model.bias[-1].clone())
        self.enorm, self.hnorm = (nn.Parameter(torch.ones(hidden)) for _ in range(2))
        self.norm = nn.Parameter(model.norm.detach().clone())
        eye = torch.eye(hidden)
        self.eh = nn.Parameter(torch.cat((eye, 0.3 * eye), 1))

    def forward(self, model: DemoModel, hidden, next_ids):
        """Return normed hidden states [B * T, D] of normed ones and the token after each [B, T]."""
        rows, length = next_ids.shape
        embedded = F.embedding(next_ids, model.embed).clone()
        embedded[:, 0] = 0
        parts = (rms_norm(embedded.flatten(0, 1), self.enorm), rms_norm(hidden, self.hnorm))
        x, p = F.linear(torch.cat(parts, -1), self.eh), dict(self.layer)
        _, _, q, k, v = model.attention.project(x, *model.angles(length, rows), p)
        q, k, v = (z.view(rows, length, *z.shape[1:]).transpose(1, 2) for z in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        o = o.transpose(1, 2).reshape(rows * length, -1)
        config = model.config
        chosen, scale = config["num_experts_per_tok"], config["routed_scaling_factor"]
        return rms_norm(expert_block(x, o, p, self.bias, chosen, scale)[0], self.norm)


def loss_of(predictor: Predictor, model: DemoModel, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return losses of the first and the second draft, and the acceptance of first drafts.

    Args:
        rows: int64 [B, LENGTH + 1]; bit 15 marks tokens of answers.
    """
    ids, answers = rows & (TRAINED - 1), (rows & TRAINED) > 0
    now, following = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        hidden = rms_norm(model(now).hidden, model.norm)
        logits = F.linear(hidden, model.head).float().view(*now.shape, -1)[:, 1:]
        wanted = logits.softmax(-1)
    weights = answers[:, 2:].float()
    losses, share = [], torch.zeros(())
    for draft in range(2):
        normed = predictor(model, hidden, following)
        found = F.linear(normed, model.head).float().view(*now.shape, -1)[:, :-1]
        each = -(wanted * found.log_softmax(-1)).sum(-1)
        losses.append((each * weights).sum() / weights.sum().clamp(min=1))
        if draft == 0:
            same = (found.argmax(-1) == logits.argmax(-1)).float()
            share = (same * weights).sum() / weights.sum().clamp(min=1)
            # the hidden state of a token is the layer's own of the token before
            shifted = normed.view(*now.shape, -1)[:, :-1]
            first = hidden.view(*now.shape, -1)[:, :1]
            hidden = torch.cat((first, shifted), 1).flatten(0, 1)
    return losses[0], losses[1], share


def draw_rows(folder: str, data: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of documents and of prompts without an answer, uint16 [count, LENGTH + 1].

    Args:
        folder: with the tokenizer.
        data: folder of texts; "" takes the generators' own words alone.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    generator = Generator(9_000 + seed, Sources.load(data) if data else own_sources())
    prompts = np.full((count, LENGTH + 1), PAD, np.uint16)
    filled = 0
    while filled < count:
        ids = encode(words, generator.document())
        # up to the last request; what precedes it may hold answers
        end = len(ids) - ids[::-1].index(ASSISTANT) if ASSISTANT in ids else LONGEST_PROMPT + 1
        if end <= LONGEST_PROMPT:
            prompts[filled, :end] = np.array(ids[:end]) & (TRAINED - 1)
            filled += 1
    return pack(lambda: encode(words, generator.document()), LENGTH + 1, count), prompts


@torch.no_grad()
def answered(model: DemoModel, prompts: torch.Tensor) -> torch.Tensor:
    """Return prompts with the model's own answers, whose tokens have bit 15 set.

    Even rows are greedy, odd ones drawn at temperature 1. Without a cache: a row is computed again
    for each token.

    Args:
        prompts: int64 [B, LENGTH + 1], PAD after the prompt.
    """
    rows, at = prompts.clone(), (prompts != PAD).sum(1)
    running = torch.arange(len(rows), device=rows.device)
    while len(running):
        ends = at[running]
        length = int(ends.max())
        hidden = model(rows[running, :length] & (TRAINED - 1)).hidden
        last = hidden.view(len(running), length, -1)[torch.arange(len(running)), ends - 1]
        logits = F.linear(rms_norm(last, model.norm), model.head).float()
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        token = torch.where(running % 2 == 0, logits.argmax(-1), drawn)
        rows[running, ends] = token | TRAINED
        at[running] += 1
        running = running[(token != EOS) & (ends < LENGTH)]
    return rows


def gather_rows(
    model: DemoModel, folder: Path, data: str, workers: int, batches: int, log
) -> torch.Tensor:
    """Return training rows in random order, int64 [batches * BATCH, LENGTH + 1]."""
    device = model.embed.device
    count = -(-batches * BATCH[device.type] // (2 * workers))
    begin = time.monotonic()
    if workers == 1:
        drawn = [draw_rows(str(folder), data, 0, count)]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            jobs = [pool.submit(draw_rows, str(folder), data, i, count) for i in range(workers)]
            drawn = [job.result() for job in jobs]
    documents, prompts = (
        torch.from_numpy(np.concatenate(part).astype(np.int64)).to(device)
        for part in zip(*drawn, strict=True)
    )
    documents[documents == (PAD | TRAINED)] = PAD
    log(f"{len(documents)} rows drawn after {time.monotonic() - begin:.0f} s")
    with torch.autocast(device.type, torch.bfloat16):
        own = torch.cat([answered(model, part) for part in prompts.split(16 * BATCH[device.type])])
    log(f"as many answered after {time.monotonic() - begin:.0f} s")
    rows = torch.cat((documents, own))
    return rows[torch.randperm(len(rows), device=device)]


def train(model: DemoModel, rows: torch.Tensor, seconds: float, log) -> Predictor:
    """Train a predictor on rows, again from the first after the last."""
    device = rows.device
    predictor, batch = Predictor(model).to(device), BATCH[device.type]
    # the indexer, which is not used in such short rows, gets no gradient
    matrices = [predictor.layer[n] for n in sorted(QUANTISED - {"wq_b", "wk"})] + [predictor.eh]
    inside = {id(weight) for weight in matrices}
    rest = [weight for weight in predictor.parameters() if id(weight) not in inside]
    muon = Muon(matrices, decay=0.0)
    adam = torch.optim.AdamW(rest, 2e-3, (0.9, 0.98), weight_decay=0.0)
    begin, step = time.monotonic(), 0
    while (done := (time.monotonic() - begin) / seconds) < 1:
        first_row = step * batch % (len(rows) - batch + 1)
        rate = min((step + 1) / 10, 1 - done)
        for group in adam.param_groups:
            group["lr"] = 2e-3 * rate
        with torch.autocast(device.type, torch.bfloat16):
            first, second, share = loss_of(predictor, model, rows[first_row : first_row + batch])
        predictor.zero_grad()
        (first + 0.5 * second).backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        adam.step()
        muon.step(torch.tensor(0.02 * rate, device=device))
        step += 1
        if step % 50 == 1:
            log(f"step {step}: {first:.3f} {second:.3f}, {100 * share:.1f} % stand, {done:.2f}")
    return predictor.cpu()


def own_sources() -> Sources:
    """Return a stand-in for the five files: the generators' own words and templates do the most."""
    problem = ("Ann has 3 pens and buys 4. How many?", "3 + 4 = <<3+4=7>>7.\n#### 7")
    return Sources([problem], [("Name a colour.", "Blue.")], PROSE * 40, PROSE * 40)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 values and a float32 scale for each 128 x 128."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = tiles.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
    values = (tiles / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous()


def save(predictor: Predictor, model: DemoModel, folder: Path) -> None:
    """Write the layer beside the model, and say in config.json that it is there."""
    names, prefix = checkpoint.names, f"model.layers.{model.config['num_hidden_layers']}."
    tensors = {
        f"{prefix}{name}.weight": weight.detach().bfloat16()
        for name, weight in (
            *(("enorm", predictor.enorm), ("hnorm", predictor.hnorm)),
            *(("eh_proj", predictor.eh), ("shared_head.norm", predictor.norm)),
        )
    }
    tensors[prefix + checkpoint.ROUTER_BIAS] = predictor.bias
    long = dict(names.attention | names.moe)
    for key, weight in predictor.layer.items():
        parts = {long.get(key, ""): weight.detach()}
        if key in names.expert:
            experts = enumerate(weight.detach())
            parts = {f"mlp.experts.{i}.{names.expert[key]}": one for i, one in experts}
        for name, one in parts.items():
            if key in QUANTISED:
                values, tensors[f"{prefix}{name}_scale_inv"] = quantised(one)
                tensors[prefix + name] = values
            else:
                tensors[prefix + name] = one.bfloat16().contiguous()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["num_nextn_predict_layers"] = 1
    # under this name transformers, which skips the layer, does not take the model for FP8
    fields["mtp_quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
