"""Training on one GPU in four phases whose lengths are shares of the time.

A dense attention on rows of 1024; B dense on 4096; C1 dense attention and the KL that trains the
indexer; C2 sparse attention (top-k set) and the KL on the selected set. The language loss trains
the model, the KL alone the indexer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checkpoint
from .config import MODEL
from .evalset import SAMPLES
from .evaluate import answers
from .model import DemoModel, token_loss
from .optimiser import Optimiser
from .rows import LONG, SHORT, Pool

PHASES = ("A", "B", "C1", "C2")
MODES = {"A": "dense", "B": "dense", "C1": "kl", "C2": "sparse"}


@dataclass
class Settings:
    """Everything a run depends on.

    Attributes:
        seconds: time from the start to the end of training, seconds.
        phases: shares of the time for A, B, C1, C2.
        tokens: tokens of a batch.
        rates: learning rates by group.
        decay_from: share of the time after which the rate falls linearly to 3 %.
        warm_up: steps over which the rate rises.
        balance: weight of the experts' balance term.
        bias_rate: step of the router's selection bias.
        sample_every: steps between printed samples.
    """

    seconds: float
    phases: tuple[float, ...] = (40.0, 15.0, 10.0, 35.0)
    tokens: int = 32768
    rates: dict[str, float] = field(
        default_factory=lambda: {"muon": 0.02, "adam": 3e-3, "gate": 1e-3, "indexer": 2e-3}
    )
    decay_from: float = 0.5
    warm_up: int = 100
    balance: float = 0.01
    bias_rate: float = 0.01
    sample_every: int = 4000


def rows_of(phase: str, step: int, through: float) -> int:
    """Row length of a step; `through` is how far the phase has come, 0 to 1.

    B takes one short step in three, C1 one long step in three, C2 one in two and in its last third
    one in six (short steps are cheap there and keep what was learned on long ones).
    """
    if phase == "A":
        return SHORT
    if phase == "B":
        return SHORT if step % 3 == 0 else LONG
    every = 3 if phase == "C1" else 2 if through < 2 / 3 else 6
    return LONG if step % every == 0 else SHORT


def phase_at(share: float, phases: tuple[float, ...]) -> tuple[str, float]:
    """(phase, how far it has come) at a share of the training time."""
    total, start = sum(phases), 0.0
    for name, length in zip(PHASES, phases, strict=True):
        length /= total
        if length and share < start + length:
            return name, (share - start) / length
        start += length
    return max(n for n, x in zip(PHASES, phases, strict=True) if x), 1.0


class Trainer:
    """One run: model, optimiser, compiled parts, and the log."""

    def __init__(self, settings: Settings, model: DemoModel, log: Callable[[str], None]):
        self.settings, self.model, self.log = settings, model, log
        self.device = model.embed.device.type
        gpu = self.device == "cuda"
        self.functions = model.functions(compiled=gpu)
        self.loss = torch.compile(token_loss, dynamic=False) if gpu else token_loss
        self.optimiser = Optimiser(model, settings.rates)
        self.steps = 0

    def _context(self):
        """Mixed precision and the fastest attention kernel (cuDNN takes heads of 128 and 64)."""
        if self.device != "cuda":
            return nullcontext()
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(order, set_priority=True)

    def _precision(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def step(self, batch, phase: str, factor: float) -> dict[str, torch.Tensor]:
        """One update from (ids, targets, weights); loss, KL (mean of layers) and expert loads."""
        ids, targets, weights = batch
        model, settings, mode = self.model, self.settings, MODES[phase]
        with self._context(), self._precision():
            out = model(ids, mode=mode, topk=model.config["index_topk"], functions=self.functions)
            loss = self.loss(out.hidden, model.norm, model.head, targets, weights)
            (loss + settings.balance * out.balance + out.kl).backward()
        self.optimiser.step(factor, factor if phase == "C2" else 1.0, mode != "dense")
        loads = torch.stack(out.loads)
        with torch.no_grad():
            mean = loads.mean(-1, keepdim=True)
            first = model.config["first_k_dense_replace"]
            model.bias[first:] += settings.bias_rate * ((mean - loads) / mean).clamp(-1, 1)
        self.steps += 1
        kl = out.kl.detach() / len(model.layers) if mode != "dense" else torch.zeros(())
        return {"loss": loss.detach(), "kl": kl, "loads": loads}

    def factor(self, share: float) -> float:
        """Learning rate factor: warm-up by steps, constant, then linear to 3 % by time."""
        s = self.settings
        warm = min(1.0, (self.steps + 1) / s.warm_up)
        if share < s.decay_from:
            return warm
        return warm * max(0.03, 1 - (share - s.decay_from) / (1 - s.decay_from))

    def run(self, pools: dict[int, Pool], tokenizer, started: float) -> None:
        """Trains until `settings.seconds` after `started` (time.time())."""
        s, begin, tokens = self.settings, time.time(), 0
        last, last_phase = (begin, 0), ""
        while True:
            share = (time.time() - begin) / max(1.0, s.seconds - (begin - started))
            if share >= 1:
                break
            phase, through = phase_at(share, s.phases)
            if phase != last_phase:
                shards = "/".join(str(len(p.seen)) for p in pools.values())
                self.log(
                    f"phase {phase} at step {self.steps}, {tokens / 1e6:.1f} M, {shards} shards"
                )
                last_phase = phase
            length, factor = rows_of(phase, self.steps, through), self.factor(share)
            seen = self.step(pools[length].batch(s.tokens // length), phase, factor)
            tokens += s.tokens
            if self.steps % 20 == 0 and self.device == "cuda":
                torch.cuda.synchronize()  # keeps the clock honest: the host runs ahead
            if self.steps % 100 == 0:
                last = self._report(phase, factor, seen, tokens, last, pools)
            if self.steps % s.sample_every == 0:
                self.samples(tokenizer, 8, "dense")
                last = (time.time(), tokens)
        self.log(f"training done: {self.steps} steps, {tokens / 1e6:.1f} M tokens")

    def _report(self, phase, factor, seen, tokens, last, pools) -> tuple[float, int]:
        """One line of the log; (now, tokens)."""
        now, loads = time.time(), seen["loads"] * self.model.config["n_routed_experts"] / 2
        for pool in pools.values():
            pool.refill()
        rounds = "/".join(str(p.rounds) for p in pools.values())
        speed = (tokens - last[1]) / (now - last[0]) / 1e3
        self.log(
            f"step {self.steps} {phase} loss {float(seen['loss']):.4f} kl {float(seen['kl']):.4f} "
            f"rate {factor:.3f} {speed:.0f} k tokens/s load {float(loads.max()):.2f}/"
            f"{float(loads.min()):.2f} reuse {rounds}"
        )
        return now, tokens

    def samples(self, tokenizer, count: int, mode: str) -> None:
        """Logs greedy answers to the first fixed prompts."""
        prompts = SAMPLES[:count]
        with self._precision():
            found = answers(self.model, tokenizer, [[("user", q)] for q in prompts], 90, mode)
        for q, a in zip(prompts, found, strict=True):
            self.log(f"  {q!r} -> {a!r}")

    def speeds(self, pools: dict[int, Pool]) -> None:
        """Logs the first (compiling) and the later step times of every phase and row length."""
        for phase, length in (
            ("A", SHORT),
            ("B", LONG),
            *((c, n) for c in ("C1", "C2") for n in pools),
        ):
            times = []
            for _ in range(7):
                start = time.time()
                seen = self.step(pools[length].batch(self.settings.tokens // length), phase, 0.1)
                loss = float(seen["loss"])  # waits for the device
                times.append(time.time() - start)
            rate = self.settings.tokens / min(times) / 1e3
            self.log(
                f"speed {phase} {length}: first {times[0]:.1f} s, then {min(times) * 1e3:.1f} ms, "
                f"{rate:.0f} k tokens/s, loss {loss:.2f}, kl {float(seen['kl']):.3f}"
            )


def open_log(path: Path) -> Callable[[str], None]:
    """A function that prints and appends timed lines."""
    started, file = time.time(), path.open("a", encoding="utf-8")

    def log(line: str) -> None:
        text = f"[{time.time() - started:6.1f}] {line}"
        print(text, flush=True)
        file.write(text + "\n")
        file.flush()

    return log


def new_model(device: str, init: str | None, seed: int = 0) -> DemoModel:
    """A fresh model, or the one of an exported folder."""
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    model = checkpoint.load(init) if init else DemoModel(MODEL)
    return model.to(device)


def write_results(path: Path, results: dict) -> None:
    """Writes a JSON file that can be read by eye."""
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
