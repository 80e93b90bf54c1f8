"""Training on one GPU in four phases whose lengths are shares of the time.

- A: dense attention on short rows.
- B: dense attention on rows of all lengths.
- C1: dense attention, and the KL that trains the indexer.
- C2: sparse attention (top-k set), and the KL on the selected set.

The language loss trains the model, and the KL trains only the indexer. A run can be cut into
stages: `save` and `resume` carry the weights, the optimiser and the place in the schedule.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .evalset import SAMPLES
from .evaluate import answers
from .model import DemoModel, token_loss
from .optimiser import Optimiser
from .rows import Pool, row_lengths

PHASES = ("A", "B", "C1", "C2")
MODES = {"A": "dense", "B": "dense", "C1": "kl", "C2": "sparse"}
# kinds of rows of a phase, in turn; C2 has a second list for its last third
ROWS = {
    "A": ("short",),
    "B": ("short", "long", "longest"),
    "C1": ("long", "short", "short", "longest", "short", "short"),
    "C2": ("long", "short", "longest", "short"),
    "end": ("long", *("short",) * 5, "longest", *("short",) * 5),
}


@dataclass
class Settings:
    """Everything a run depends on.

    Attributes:
        seconds: time of training, seconds; the first step of each shape (it compiles) is free.
        phases: shares of the time for A, B, C1, C2.
        tokens: tokens of a batch.
        scores: largest rows * length² of a step that keeps attention matrices (64 GiB of memory).
        rates: learning rates by group.
        decay_from: share of the time after which the rate falls linearly to 3 %.
        warm_up: steps over which the rate rises.
        balance: weight of the experts' balance term.
        bias_rate: step of the router's selection bias.
        sample_every: steps between printed samples.
    """

    seconds: float
    phases: tuple[float, ...] = (48.0, 14.0, 6.0, 32.0)
    tokens: int = 32768
    scores: int = 1 << 27
    rates: dict[str, float] = field(
        default_factory=lambda: {"muon": 0.02, "adam": 3e-3, "gate": 1e-3, "indexer": 2e-3}
    )
    decay_from: float = 0.45
    warm_up: int = 100
    balance: float = 0.01
    bias_rate: float = 0.01
    sample_every: int = 8000


def rows_of(phase: str, step: int, through: float) -> str:
    """Return the kind of rows of a step. `through` is the progress of the phase, 0 to 1.

    In its last third C2 takes one long row in six: short ones are cheap there and keep what was
    learned on long ones.
    """
    kinds = ROWS["end" if phase == "C2" and through >= 2 / 3 else phase]
    return kinds[step % len(kinds)]


def phase_at(share: float, phases: tuple[float, ...]) -> tuple[str, float]:
    """Return the phase and its progress at a share of the training time."""
    total, start = sum(phases), 0.0
    for name, length in zip(PHASES, phases, strict=True):
        length /= total
        if length and share < start + length:
            return name, (share - start) / length
        start += length
    return max(n for n, x in zip(PHASES, phases, strict=True) if x), 1.0


class CapturedStep:
    """An update of one shape as a CUDA graph: the host of a small model is slower than its GPU.

    Capturing changes no weight; a call copies a batch to where the graph reads it, and replays.
    """

    def __init__(self, update: Callable, batch):
        self.batch = tuple(x.clone() for x in batch)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.seen = update(self.batch)

    def __call__(self, batch) -> dict[str, torch.Tensor]:
        for mine, given in zip(self.batch, batch, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.seen


class Trainer:
    """A run: model, optimiser, compiled parts, and the log."""

    def __init__(self, settings: Settings, model: DemoModel, log: Callable[[str], None]):
        self.settings, self.model, self.log = settings, model, log
        self.device = model.embed.device.type
        gpu = self.device == "cuda"
        self.functions = model.functions(compiled=gpu)
        self.loss = torch.compile(token_loss, dynamic=False) if gpu else token_loss
        self.optimiser = Optimiser(model, settings.rates)
        self.lengths = row_lengths(model.config["max_position_embeddings"])
        self.steps, self.tokens, self.spent = 0, 0, 0.0
        self.seen: set[tuple[str, str]] = set()  # shapes that are compiled
        self.captured: dict[str, CapturedStep] = {}  # dense steps by kind of rows

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "place": (self.steps, self.tokens, self.spent),
        }
        torch.save(state, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").rename(path)

    def resume(self, path: Path) -> None:
        """Go on where `save` was called."""
        state = torch.load(path, map_location=self.model.embed.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps, self.tokens, self.spent = state["place"]

    def rows(self, phase: str, kind: str) -> int:
        """Return rows of a step: `tokens` of them, fewer where attention matrices are kept."""
        length = self.lengths[kind]
        rows = self.settings.tokens // length
        return max(
            1, rows if MODES[phase] == "dense" else min(rows, self.settings.scores // length**2)
        )

    def _context(self):
        """Return a context with mixed precision and the fastest attention kernel (cuDNN)."""
        if self.device != "cuda":
            return nullcontext()
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(order, set_priority=True)

    def _precision(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def step(self, batch, phase: str, kind: str, factor: float) -> dict[str, torch.Tensor]:
        """Update from (ids, targets, weights). Returns loss, mean KL of the layers, and loads.

        What it returns is overwritten by later steps of the same kind.
        """
        mode = MODES[phase]
        self.optimiser.set_rates(factor, factor if phase == "C2" else 1.0)
        self.steps += 1
        if mode != "dense" or self.device != "cuda":
            return self._update(batch, mode)
        if kind not in self.captured:
            # compiles, and makes the state of the optimisers, before the first capture
            seen = self._update(batch, mode)
            self.captured[kind] = CapturedStep(lambda b: self._update(b, mode), batch)
            return seen
        return self.captured[kind](batch)

    def _update(self, batch, mode: str) -> dict[str, torch.Tensor]:
        """Run forward, backward and the optimisers, without a wait for the GPU."""
        ids, targets, weights = batch
        model, settings = self.model, self.settings
        with self._context(), self._precision():
            out = model(ids, mode=mode, topk=model.config["index_topk"], functions=self.functions)
            loss = self.loss(out.hidden, model.norm, model.head, targets, weights)
            (loss + settings.balance * out.balance + out.kl).backward()
        self.optimiser.step(mode != "dense")
        loads = torch.stack(out.loads)
        with torch.no_grad():
            mean = loads.mean(-1, keepdim=True)
            first = model.config["first_k_dense_replace"]
            model.bias[first:] += settings.bias_rate * ((mean - loads) / mean).clamp(-1, 1)
        kl = out.kl.detach() / len(model.layers) if mode != "dense" else torch.zeros(())
        return {"loss": loss.detach(), "kl": kl, "loads": loads}

    def factor(self, share: float) -> float:
        """Return learning rate factor: warm-up by steps, constant, then linear to 3 % by time."""
        s = self.settings
        warm = min(1.0, (self.steps + 1) / s.warm_up)
        if share < s.decay_from:
            return warm
        return warm * max(0.03, 1 - (share - s.decay_from) / (1 - s.decay_from))

    def run(
        self,
        pools: dict[str, Pool],
        tokenizer,
        stop_at: float = float("inf"),
        keep: Path | None = None,
    ) -> bool:
        """Train until `settings.seconds` are spent (True) or until time.time() is `stop_at`.

        The state is saved to `keep` where a new phase begins.
        """
        s, last_phase = self.settings, ""
        last = (time.time(), self.tokens)
        while self.spent < s.seconds:
            if time.time() >= stop_at:
                return False
            began, share = time.time(), self.spent / s.seconds
            phase, through = phase_at(share, s.phases)
            if phase != last_phase:
                self.log(f"phase {phase} at step {self.steps}, {self.tokens / 1e6:.1f} M tokens")
                if last_phase and keep:
                    self.save(keep)
                last_phase = phase
            kind, factor = rows_of(phase, self.steps, through), self.factor(share)
            rows, shape = self.rows(phase, kind), (MODES[phase], kind)
            seen = self.step(pools[kind].batch(rows), phase, kind, factor)
            self.tokens += rows * self.lengths[kind]
            if self.device == "cuda" and (self.steps % 20 == 0 or shape not in self.seen):
                torch.cuda.synchronize()  # keeps the clock honest: the host runs ahead
            self.spent += (time.time() - began) * (shape in self.seen)
            self.seen.add(shape)
            if self.steps % 100 == 0:
                last = self._report(phase, factor, seen, last, pools)
            if self.steps % s.sample_every == 0:
                self.samples(tokenizer, 8, "dense")
                last = (time.time(), self.tokens)
        self.log(f"training done: {self.steps} steps, {self.tokens / 1e6:.1f} M tokens")
        return True

    def _report(self, phase, factor, seen, last, pools) -> tuple[float, int]:
        """Write a line of the log. Returns the time and the tokens so far."""
        now, loads = time.time(), seen["loads"] * self.model.config["n_routed_experts"] / 2
        shards = " ".join(f"{k} {p.taken}+{p.again}" for k, p in pools.items())
        speed = (self.tokens - last[1]) / (now - last[0]) / 1e3
        self.log(
            f"step {self.steps} {phase} loss {float(seen['loss']):.4f} kl {float(seen['kl']):.4f} "
            f"rate {factor:.3f} {speed:.0f} k tokens/s load {float(loads.max()):.2f}/"
            f"{float(loads.min()):.2f} spent {self.spent:.0f} s, shards {shards}"
        )
        return now, self.tokens

    def samples(self, tokenizer, count: int, mode: str) -> None:
        """Log greedy answers to the first fixed prompts."""
        prompts = SAMPLES[:count]
        with self._precision():
            found = answers(self.model, tokenizer, [[("user", q)] for q in prompts], 90, mode)
        for q, a in zip(prompts, found, strict=True):
            self.log(f"  {q!r} -> {a!r}")


def open_log(path: Path) -> Callable[[str], None]:
    """Return a function that prints and appends timed lines."""
    started = time.time()

    def log(line: str) -> None:
        text = f"[{time.time() - started:6.1f}] {line}"
        print(text, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    return log


def new_model(device: str, config: dict, seed: int = 0) -> DemoModel:
    """Return a fresh model."""
    torch.manual_seed(seed)
    random.seed(seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    return DemoModel(config).to(device)
