"""Random request histories whose steps with prompts are graphs of several sizes, or eager.

    python -m tests.soak.captured --histories 20
    python -m tests.soak.captured --first 4711 --histories 1

The tiny model is on the test plug-in's device in host memory, where Triton interprets the kernels.
A graph there is its work, run again. Each history captures steps of a few small sizes, so steps
with more tokens, prompts or samples are eager. Every output must be the one of an engine without
graphs, whose steps have no padding.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.gpu_rig.session import opened

# before anything imports Paddle
RIG = opened()

from fd_dsa.engine.engine import LLMEngine  # noqa: E402
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter  # noqa: E402
from fd_dsa.engine.output import RequestOutput  # noqa: E402
from fd_dsa.engine.sampling_params import SamplingParams  # noqa: E402
from fd_dsa.engine.speculation import SpecDecoder  # noqa: E402
from fd_dsa.runner import InputBatch  # noqa: E402
from fd_dsa.startup.capture import capture_graphs  # noqa: E402
from tests.engine.fakes import byte_tokenizer  # noqa: E402
from tests.gpu_rig.captures import capture_of  # noqa: E402
from tests.runner.dsa import dsa_runner  # noqa: E402
from tests.runner.tiny import V32, tiny_model  # noqa: E402
from tests.soak import report  # noqa: E402
from tests.soak.audit import audit  # noqa: E402
from tests.soak.histories import Arrival  # noqa: E402

LETTERS, EOS, BLOCK_SIZE, MAX_MODEL_LEN = 40, 1, 8, 40
TOKENIZER = byte_tokenizer()


@dataclass(frozen=True)
class History:
    """Sizes of an engine and its graphs, and the requests of a history.

    Attributes:
        sizes: numbers of tokens of captured decode steps.
        prompt_sizes: numbers of tokens of captured steps with prompts.
    """

    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    sizes: tuple[int, ...]
    prompt_sizes: tuple[int, ...]
    max_drafts: int
    async_scheduling: bool
    arrivals: tuple[Arrival, ...]


def draw_history(number: int) -> History:
    """Draw the history of a number. One in four has more prompts at once than a graph."""
    draw = random.Random(number)
    is_crowd = number % 4 == 3
    budget = 40 if is_crowd else draw.choice([12, 20])
    rows = 20 if is_crowd else draw.choice([3, 4])
    prompt_sizes = draw.sample([2, 5, 8, 11], 2)
    stem = [draw.randrange(2, LETTERS) for _ in range(30)]
    arrivals = [_draw_arrival(draw, stem, longest=24, last_step=12) for _ in range(6)]
    if is_crowd:
        prompt_sizes[0] = budget
        # at once, and shorter than a block, so that no prompt is cached
        arrivals += [_draw_arrival(draw, stem, longest=2, last_step=0) for _ in range(18)]
    return History(
        num_blocks=rows * 2 + draw.choice([0, 2, 10]),
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        sizes=tuple(draw.sample([1, 2, 3, 6], draw.choice([1, 1, 2]))),
        prompt_sizes=tuple(prompt_sizes),
        max_drafts=draw.choice([0, 0, 1, 2]),
        async_scheduling=draw.random() < 0.8,
        arrivals=tuple(arrivals),
    )


def _draw_arrival(draw: random.Random, stem: list[int], longest: int, last_step: int) -> Arrival:
    """Draw a request whose prompt may begin as others do.

    Args:
        longest: largest number of tokens of the prompt.
        last_step: latest step before which it arrives.
    """
    num_own = draw.randint(1, 3)
    prompt = stem[: draw.randint(0, longest - num_own)] if longest > num_own else []
    prompt += [draw.randrange(2, LETTERS) for _ in range(min(num_own, longest))]
    params = SamplingParams(
        temperature=draw.choice([0.0, 0.0, 0.8]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        bad_words=draw.choice([None, None, None, ["ab", "c"]]),
        seed=draw.randrange(1 << 30),
        max_tokens=draw.randint(1, 8),
        ignore_eos=draw.random() < 0.7,
        logprobs=draw.choice([None] * 7 + [1]),
        prompt_logprobs=draw.choice([None] * 5 + [1]),
    )
    at_step = draw.randint(0, last_step)
    abort_at = at_step + draw.randint(1, 8) if draw.random() < 0.15 else None
    return Arrival(tuple(prompt), params, at_step, abort_at)


def make_engine(history: History, *, is_captured: bool) -> LLMEngine:
    """Make the engine of a history over poisoned caches, with its graphs or without."""
    import paddle

    fields = V32 | {"num_hidden_layers": 2, "vocab_size": LETTERS, "num_nextn_predict_layers": 1}
    has_drafts = history.max_drafts > 0
    model = tiny_model(fields, seed=2, device=RIG.device, mtp=() if has_drafts else None)
    sizes = MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE
    batch = InputBatch(history.max_num_seqs, history.max_num_batched_tokens, *sizes)
    layout = model.config.cache_layout("float32", BLOCK_SIZE)
    most = history.max_drafts
    runner = dsa_runner(model, batch, layout, history.num_blocks, RIG.device, max_drafts=most)
    for cache in runner.caches:
        poison = paddle.full(cache.shape, float("nan"), cache.dtype)
        cache.copy_(poison.to(cache.place), False)
    if is_captured:
        capture_graphs(runner, history.sizes, capture_of(RIG), history.prompt_sizes)
        assert runner.graphs, "the captures were refused"
    return LLMEngine(
        runner,
        TOKENIZER,
        num_blocks=history.num_blocks,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        async_scheduling=history.async_scheduling,
        spec_decoder=SpecDecoder(DeviceMtpDrafter(runner), most) if has_drafts else None,
    )


def play(engine: LLMEngine, arrivals: Sequence[Arrival]) -> dict[tuple[str, int], RequestOutput]:
    """Run requests, named by their numbers. Returns the last state of every output."""
    last: dict[tuple[str, int], RequestOutput] = {}
    step = 0
    while engine.has_unfinished_requests() or step <= max(a.at_step for a in arrivals):
        outputs: list[RequestOutput] = []
        for index, one in enumerate(arrivals):
            if one.at_step == step:
                engine.add_request(str(index), one.prompt, one.params)
            if one.abort_at == step:
                outputs += engine.abort_request(str(index))
        if engine.has_unfinished_requests():
            outputs += engine.step()
            audit(engine)
        last |= {(output.request_id, output.index): output for output in outputs}
        step += 1
    assert engine.stats().num_used_blocks == 0
    return last


def counts_of(engine: LLMEngine) -> Counter[str]:
    """Return the kinds of the steps of an engine, and how often things happened."""
    stats, counters = engine.stats(), engine.runner.info.counters
    assert counters is not None, "a runner of the project counts its steps"
    kinds, reasons = counters.graph_steps.items(), counters.eager_steps.items()
    counts = Counter({f"{kind} steps from graphs": count for kind, count in kinds})
    counts += Counter({f"eager steps because of {name}": count for name, count in reasons})
    names = "num_preemptions", "prefix_cache_hits", "prefix_cache_host_hits", "num_accepted_tokens"
    return counts + Counter({name: getattr(stats, name) for name in names})


def run(
    history: History, *, is_captured: bool
) -> tuple[dict[tuple[str, int], RequestOutput], Counter[str]]:
    """Run a history. Returns the last state of every output, and the kinds of its steps."""
    engine = make_engine(history, is_captured=is_captured)
    last, counts = play(engine, history.arrivals), Counter[str]()
    if is_captured:
        counts = counts_of(engine)
        # graphs must be gone before Paddle's memory
        engine.runner.graphs = None
    del engine
    gc.collect()
    return last, counts


def run_history(history: History) -> Counter[str]:
    """Run a history with graphs and without.

    Returns:
        How often things happened with graphs.

    Raises:
        AssertionError: an output differs.
    """
    wanted, _ = run(history, is_captured=False)
    found, counts = run(history, is_captured=True)
    assert found.keys() == wanted.keys() and len(found) == len(history.arrivals)
    for (name, index), output in found.items():
        for field in ("token_ids", "finish_reason", "text"):
            pair = getattr(output, field), getattr(wanted[name, index], field)
            assert pair[0] == pair[1], f"request {name}: {field} {pair[0]}, eager {pair[1]}"
        counts["outputs"] += 1
    return counts


def run_histories(first: int, count: int) -> Counter[str]:
    """Run the histories `first` to `first + count - 1`. Returns how often things happened."""
    numbers = range(first, first + count)
    return report.run_numbers(
        "tests.soak.captured", numbers, lambda number: run_history(draw_history(number))
    )


if __name__ == "__main__":
    report.main(__doc__, "histories", 20, run_histories)
