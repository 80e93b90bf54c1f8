"""Steps that find no memory: later ones need less, and no other request is lost."""

from __future__ import annotations

import numpy as np
import pytest

from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.sampling_params import SamplingParams
from fd_dsa.engine.speculation import SpecDecoder
from tests.engine.drafters import KnowingDrafter
from tests.engine.fakes import make_engine, run_all

PROMPTS = [list(range(2, 2 + length)) for length in (30, 5, 17, 1, 9, 24)]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)


def with_memory_for(engine: LLMEngine, tokens: int, rows: int) -> list[tuple[int, int]]:
    """Have steps of more tokens or rows fail; returns a list that gets their tokens and rows."""
    runner, refused = engine.runner, []
    execute = runner.execute_model

    def execute_model(logits_indices: np.ndarray) -> np.ndarray:
        batch = runner.input_batch
        size = batch.num_tokens, int((batch.num_scheduled_tokens > 0).sum())
        if size[0] > tokens or size[1] > rows:
            refused.append(size)
            raise RuntimeError("ResourceExhaustedError: Out of memory error on GPU 0")
        return execute(logits_indices)

    runner.execute_model = execute_model
    return refused


def answers(engine: LLMEngine) -> dict[str, tuple[list[int], str | None]]:
    """Tokens and finish reason of each of the prompts, asked at once."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, PARAMS)
    done = run_all(engine)
    return {name: (states[-1].token_ids, states[-1].finish_reason) for name, states in done.items()}


@pytest.mark.parametrize(("tokens", "rows"), [(15, 4), (4, 4), (3, 3), (2, 2), (16, 2), (1, 1)])
def test_less_memory_gives_the_same_tokens(
    tokens: int, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(make_engine())
    engine = make_engine(enable_prefix_caching=False)
    refused = with_memory_for(engine, tokens, rows)
    assert answers(engine) == expected
    # chunks of half as many tokens, then fewer rows: no step is tried twice
    assert 0 < len(refused) <= 5 + 3 and len(set(refused)) == len(refused)
    said = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert len(said) == len(refused) and "on GPU 0; " in said[0]
    assert engine.stats().num_used_blocks == 0
    # with no request left, the next ones may be as large as the first
    del refused[:]
    assert answers(engine) == expected and refused


def test_drafts_are_left_out_first(caplog: pytest.LogCaptureFixture) -> None:
    expected = answers(make_engine())
    known = {(name, 0): tokens for name, (tokens, _) in expected.items()}
    engine = make_engine(spec_decoder=SpecDecoder(KnowingDrafter(known, 1.0, 2), 3))
    # prompts of 8 tokens fit, and so do four rows
    with_memory_for(engine, 8, 4)
    assert answers(engine) == expected
    said = [r.getMessage() for r in caplog.records if "Out of memory" in r.getMessage()]
    assert len(said) == 2 and "no drafts are verified now" in "".join(said)


def test_a_request_that_needs_too_much_alone_ends_and_others_go_on() -> None:
    engine = make_engine(max_num_seqs=1)
    with_memory_for(engine, 16, 1)
    fits = engine.runner.execute_model

    def execute_model(logits_indices: np.ndarray) -> np.ndarray:
        # long contexts do not fit, however few tokens are computed
        if engine.runner.input_batch.max_seqlen_k > 20:
            raise MemoryError
        return fits(logits_indices)

    engine.runner.execute_model = execute_model
    reasons = {name: reason for name, (_, reason) in answers(engine).items()}
    long = {str(i) for i, prompt in enumerate(PROMPTS) if len(prompt) + 12 - 1 > 20}
    assert {name for name, reason in reasons.items() if reason == "error"} == long
    assert set(reasons) == {str(i) for i in range(len(PROMPTS))}
    assert not engine.has_unfinished_requests() and engine.stats().num_used_blocks == 0


def test_other_failures_of_a_step_are_not_hidden() -> None:
    engine = make_engine()
    engine.add_request("0", PROMPTS[0], PARAMS)
    engine.runner.fail_at = 0
    with pytest.raises(OSError, match="the device is gone"):
        engine.step()
