"""A simulator of an engine that runs a builder of V4 index arrays on tagged memory.

    simulate(cfg, naive, seed=7, num_steps=50)

plays one random history and raises Violation where a layer would read a key that is not exactly
the one it must read, or write where it must not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np

from tests.v4_prepare.simulator_layers import Outputs, run_layers
from tests.v4_prepare.simulator_memory import Memory, Violation
from tests.v4_prepare.simulator_requests import Scheduler, Step

Build = Callable[..., Any]
"""`(cfg, ctx, q, slot, block_table)` -> arrays by attribute or by name."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step, under the names of V4PrepareConfig; small unless told otherwise."""

    window_size: int = 8
    spec_tokens: int = 3
    block_size: int = 16
    csa_ratio: int = 4
    hca_ratio: int = 16
    index_topk: int = 3
    num_slots: int = 5
    num_blocks: int = 26
    max_blocks_per_seq: int = 7
    max_num_seqs: int = 4
    max_num_tokens: int = 48
    max_tokens_per_seq: int = 40
    max_model_len: int = 112
    swa: str = "ring"
    comp_base: int | None = None
    hca_mode: str | None = None


REAL = Sizes(
    window_size=128,
    block_size=128,
    csa_ratio=4,
    hca_ratio=128,
    index_topk=512,
    num_slots=10,
    num_blocks=2200,
    max_blocks_per_seq=512,
    max_num_seqs=8,
    max_num_tokens=1100,
    max_tokens_per_seq=1024,
    max_model_len=65536,
)
"""The window, blocks and ratios of DeepSeek-V4."""


def simulate(
    cfg: Any,
    build: Build,
    seed: int,
    num_steps: int,
    *,
    late: bool = False,
    translate: Callable[..., Any] | None = None,
    scheduler: Callable[..., Scheduler] = Scheduler,
) -> Counter[str]:
    """Play one random history with the arrays of `build`.

    Args:
        cfg: sizes, any object with the fields of V4PrepareConfig; handed on to `build`.
        build: called once a step, in order; may keep and reuse its arrays.
        seed: of everything random.
        late: the host does not know yet which drafts were refused in the step before: `build` is
            called with the optimistic ctx and, as fifth array, the int32 [B] rollback.
        translate: `(out of build, block_table, local_topk)` -> rows of chosen entries of ratio 1.
        scheduler: a Scheduler, or one that makes a mistake.

    Returns:
        How often what happened, by name.

    Raises:
        Violation: with the step at which it was found.
    """
    rng = Random(seed)
    memory = Memory(cfg)
    engine = scheduler(cfg, memory, rng, late)
    orders = np.random.default_rng(seed)
    for number in range(num_steps):
        step = engine.next_step()
        result = _call(build, cfg, step, late)
        rows_of = partial(translate, result) if translate else None
        try:
            run_layers(memory, step, Outputs(result), orders, rows_of)
        except Violation as error:
            text = f"{error.text}\n{_explain(cfg, seed, number, step)}"
            raise Violation(error.kind, error.part, text) from None
        engine.finish_step(step)
    return engine.events


def _call(build: Build, cfg: Any, step: Step, late: bool) -> Any:
    """The arrays of one step."""
    if late:
        return build(cfg, step.staged_ctx, step.q, step.slot, step.table, step.rollback)
    return build(cfg, step.ctx, step.q, step.slot, step.table)


def _explain(cfg: Any, seed: int, number: int, step: Step) -> str:
    """The inputs of the step that failed."""
    return (
        f"seed {seed}, step {number}, swa {cfg.swa}, k {cfg.spec_tokens}\n"
        f"ctx {step.ctx.tolist()}\nq {step.q.tolist()}\nslot {step.slot.tolist()}\n"
        f"rollback {step.rollback.tolist()}\nblock_table {step.table.tolist()}"
    )
