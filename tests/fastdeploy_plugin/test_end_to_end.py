"""Whole answers of the demo model in FastDeploy's double: every tree, every way to schedule them.

The answers are Hugging Face's (`demo_prompts.py`), and those of the embedded engine on the same
caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from fd_dsa import LLM, SamplingParams
from tests.fakes.driver import Job
from tests.fakes.trees import TREES, V1_VARIABLE
from tests.fastdeploy_plugin.demo_prompts import demo_prompts
from tests.fastdeploy_plugin.engines import make_engine, ours
from tests.fastdeploy_plugin.watching import Watch, watch_steps

SIZES = {"max_model_len": 1024, "max_num_seqs": 5, "max_num_batched_tokens": 200}
NUM_BLOCKS = 40


@pytest.fixture(scope="module")
def prompts() -> Any:
    return demo_prompts()


def test_the_embedded_engine_answers_as_hugging_face(prompts: Any) -> None:
    with LLM(kv_cache_dtype="fp8_ds_mla", max_model_len=1024, max_num_seqs=4) as llm:
        for name in ("number", "edge", "block", "unknown"):
            wanted = prompts[name].answer
            params = SamplingParams(temperature=0, max_tokens=len(wanted), ignore_eos=True)
            (output,) = llm.generate([prompts[name].token_ids], params)
            assert output.token_ids == wanted, name


def oracle(wanted: list[list[int]], wrong_every: int) -> Any:
    """Drafts that follow one of the given sequences, each `wrong_every`-th of them another."""

    def drafts(tokens: list[int]) -> list[int]:
        for sequence in wanted:
            if sequence[: len(tokens)] == tokens:
                found = sequence[len(tokens) : len(tokens) + 2]
                places = range(len(tokens), len(tokens) + len(found))
                wrong = [place % wrong_every == 0 for place in places]
                return [one + bad for one, bad in zip(found, wrong, strict=True)]
        raise AssertionError("the row has left its answer")

    return drafts


def jobs_of(prompts: Any, drafts: Any = None) -> tuple[list[str], list[Any]]:
    """Names and jobs: a long prompt in several steps, a prefix hit, chunks, preemptions, waits."""

    def job(name: str, **how: Any) -> Job:
        return Job(prompts[name].token_ids, len(prompts[name].answer), drafts=drafts, **how)

    number = job("number")
    jobs = {
        "unknown": job("unknown", preempt_at=(3, 5)),
        "number": number,
        "edge": job("edge", chunk=64, late_blocks=2),
        "food": job("food", after=number, preempt_at=(4,)),
        "block": job("block", chunk=13, start_at=4, late_blocks=1),
        "sum": job("sum", start_at=2),
        "fact": job("fact", chunk=3, start_at=9),
    }
    return list(jobs), list(jobs.values())


@dataclass(frozen=True)
class Mode:
    """Form in which FastDeploy runs, and the steps that it must bring about."""

    overrides: dict[str, Any]
    kinds: set[str] = field(default_factory=set)


MODES = {
    "eager": Mode({"enable_overlap_schedule": False}),
    "graphs": Mode(
        {"use_cudagraph": True, "cudagraph_capture_sizes": [5, 3, 1]},
        {"graph"},
    ),
    "drafts": Mode(
        {
            "use_cudagraph": True,
            "cudagraph_capture_sizes": [15, 6],
            "method": "ngram",
            "num_speculative_tokens": 2,
        },
        {"graph", "drafts"},
    ),
}
ALWAYS = {"prefill", "decode", "mixed", "later chunk", "idle row between others"}


@pytest.mark.parametrize(
    ("tree", "mode"),
    [
        ("pr7367", "eager"),
        # steps of graphs as well
        ("develop", "drafts"),
        *(
            pytest.param(tree, mode, marks=pytest.mark.slow)
            for tree, mode in (
                ("pr7367", "graphs"),
                ("pr7367", "drafts"),
                ("develop", "eager"),
                ("develop", "graphs"),
            )
        ),
    ],
)
def test_answers_are_those_of_hugging_face(tree: str, mode: str, prompts: Any) -> None:
    wanted = [one.token_ids + one.answer for one in prompts.values()]
    drafts = oracle(wanted, 4) if mode == "drafts" else None
    overlap = {"enable_overlap_schedule": TREES[tree].overlap_schedule}
    with ours(TREES[tree]):
        engine = make_engine(NUM_BLOCKS, **{**SIZES, **overlap, **MODES[mode].overrides})
        watch = watch_steps(engine)
        names, jobs = jobs_of(prompts, drafts)
        answers = dict(zip(names, engine.generate(jobs), strict=True))
    assert answers == {name: prompts[name].answer for name in names}
    assert watch.trespasses == []
    _check_steps(watch, jobs)
    surplus = {"surplus"} if engine.config.scheduler_config.enable_overlap_schedule else set()
    assert watch.kinds() >= ALWAYS | MODES[mode].kinds | surplus


def test_the_v1_cache_manager_serves_too(prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastDeploy's variable may be set: its caches are those of its own DSA backend."""
    wanted = prompts["fact"]
    with ours():
        monkeypatch.setenv(V1_VARIABLE, "1")
        engine = make_engine(NUM_BLOCKS, **SIZES)
        assert engine.runner.enable_cache_manager_v1
        caches = engine.runner.share_inputs["caches"]
        assert [str(cache.dtype) for cache in caches] == ["paddle.uint8"] * len(caches)
        job = Job(wanted.token_ids, len(wanted.answer))
        assert engine.generate([job]) == [wanted.answer]


def _check_steps(watch: Watch, jobs: list[Any]) -> None:
    """Check that the steps were those asked for, and that the fields are those of the rows."""
    assert [job.preempted for job in jobs] == [len(job.preempt_at) for job in jobs]
    for step in watch.steps:
        _, decoder, now = step.lengths
        positions = [d + j for d, n in zip(decoder, now, strict=True) for j in range(n)]
        assert step.position_ids[: step.tokens].tolist() == positions
        assert (step.slot_mapping[step.tokens :] == -1).all()
