"""Random requests over a tiny model, with drafts and without: nothing that a caller sees changes.

    FD_DSA_BATCH_INVARIANT=1 python -m tests.soak.speculation --groups 200
    python -m tests.soak.speculation --groups 200

A group is ten requests of every kind, all at once, with prefix hits, chunks, preemption and
cancellations. It runs without drafts, then with prompt lookup, the layer for multi-token
prediction, and a drafter that is mostly right, each with 1 to 3 drafts. With
FD_DSA_BATCH_INVARIANT=1 every output, reason and log-probability must be the same to the bit.
Without it outputs may differ where rounding decides on a token, or on a key or expert, which moves
log-probabilities by more than 1e-4: these are counted, at most one in 1,000.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from fd_dsa.environment import batch_invariant, prepare_cpu_runtime

prepare_cpu_runtime()

from fd_dsa.engine.engine import LLMEngine  # noqa: E402
from fd_dsa.engine.mtp_drafter import MtpDrafter  # noqa: E402
from fd_dsa.engine.output import RequestOutput  # noqa: E402
from fd_dsa.engine.prompt_lookup import PromptLookup  # noqa: E402
from fd_dsa.engine.sampling_params import SamplingParams  # noqa: E402
from fd_dsa.engine.speculation import SpecDecoder  # noqa: E402
from fd_dsa.engine.structured_outputs import StructuredOutputsParams  # noqa: E402
from tests.engine.drafters import KnowingDrafter  # noqa: E402
from tests.engine.fakes import byte_tokenizer  # noqa: E402
from tests.engine.mtp_engine import EOS, MAX_MODEL_LEN, dear_layer, make_model, make_runner  # noqa: E402
from tests.runner.tiny import GLM, V32  # noqa: E402
from tests.soak import report  # noqa: E402

REQUESTS, LETTERS, NUM_BLOCKS = 10, 40, 14
TOLERANCE = 1e-4
MODELS = [make_model(fields | {"vocab_size": LETTERS}) for fields in (V32, GLM)]
TOKENIZER = byte_tokenizer()
Asked = tuple[list[int], SamplingParams, int | None]


def draw_group(draw: random.Random) -> list[Asked]:
    """Prompts, parameters, and the step before which a request is cancelled."""
    stem = [draw.randrange(2, LETTERS) for _ in range(30)]
    return [_draw_request(draw, stem) for _ in range(REQUESTS)]


def _draw_request(draw: random.Random, stem: list[int]) -> Asked:
    prompt = stem[: draw.randint(0, 30)] + [draw.randrange(2, 40) for _ in range(3)]
    form = draw.choice([None] * 5 + [StructuredOutputsParams(regex="[a-e]{3,20}(XY)?")])
    params = SamplingParams(
        n=draw.choice([1, 1, 1, 2]),
        temperature=draw.choice([0.0, 0.0, 0.3, 1.0]),
        top_k=draw.choice([0, 5]),
        top_p=draw.choice([1.0, 0.8]),
        min_p=draw.choice([0.0, 0.1]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
        presence_penalty=draw.choice([0.0, 0.0, -0.5]),
        logit_bias=draw.choice([None, None, {draw.randrange(2, LETTERS): 3.0}]),
        bad_words=draw.choice([None, None, ["ab", "c"]]),
        stop=draw.choice([None, None, ["a", "bc"]]),
        stop_token_ids=draw.choice([None, None, [draw.randrange(2, LETTERS)]]),
        min_tokens=draw.choice([0, 0, 6]),
        max_tokens=draw.randint(6, 40),
        ignore_eos=draw.random() < 0.5,
        seed=draw.randrange(1 << 30),
        logprobs=draw.choice([None, 0, 2]),
        prompt_logprobs=draw.choice([None, None, None, 1]),
        structured_outputs=form,
        cache_salt=draw.choice([None, None, "a"]),
    )
    return prompt, params, draw.choice([None, None, None, draw.randint(2, 20)])


def run(
    number: int, asked: list[Asked], method: str, answers: dict[tuple[str, int], RequestOutput]
) -> tuple[dict[tuple[str, int], RequestOutput], Counter[str]]:
    """The last state of every output, and what happened."""
    runner = make_runner(MODELS[number % 2], NUM_BLOCKS)
    tokens = {name: output.token_ids for name, output in answers.items()}
    knowing = KnowingDrafter(tokens, 0.8, LETTERS, number, is_layer=number % 4 > 1)
    drafters: dict[str, Any] = {"ngram": PromptLookup(3, 1), "knowing": knowing}
    drafter = drafters.get(method) or MtpDrafter(runner)
    # in half of the groups requests leave whose drafts do not pay for the layer
    most = 1 + number % 3
    costs = dear_layer(most) if method == "mtp" and number % 4 > 1 else None
    engine = LLMEngine(
        runner,
        TOKENIZER,
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[EOS],
        spec_decoder=None if method == "none" else SpecDecoder(drafter, most, costs),
    )
    for index, (prompt, params, _) in enumerate(asked):
        engine.add_request(str(index), prompt, params)
    last: dict[tuple[str, int], RequestOutput] = {}
    step = 0
    while engine.has_unfinished_requests():
        for index, (_, _, aborted) in enumerate(asked):
            # an answer without drafts is compared whole
            if method != "none" and aborted == step:
                last |= {(o.request_id, o.index): o for o in engine.abort_request(str(index))}
        last |= {(o.request_id, o.index): o for o in engine.step()}
        step += 1
    stats = engine.stats()
    assert stats.num_used_blocks == 0
    names = ("num_preemptions", "prefix_cache_hits", "num_draft_tokens", "num_accepted_tokens")
    return last, Counter({f"{method}: {name}": getattr(stats, name) for name in names})


def run_groups(first: int, count: int) -> Counter[str]:
    """Run the groups `first` to `first + count - 1`; what happened in all of them."""
    counts: Counter[str] = Counter()
    for number in range(first, first + count):
        asked = draw_group(random.Random(number))
        plain, seen = run(number, asked, "none", {})
        counts += seen
        counts["requests"] += len(asked)
        for method in ("ngram", "mtp", "knowing"):
            found, seen = run(number, asked, method, plain)
            counts += seen
            assert found.keys() == plain.keys()
            for name, output in found.items():
                _compare(output, plain[name], f"group {number}, {method}, output {name}", counts)
    if not batch_invariant():
        assert counts["outputs that differ by rounding"] <= max(1, counts["outputs"] / 1000)
    return counts


def _compare(found: RequestOutput, plain: RequestOutput, name: str, counts: Counter[str]) -> None:
    """All that a caller sees is that without drafts; of a cancelled output, its beginning."""
    counts["outputs"] += 1
    length = len(found.token_ids)
    if found.finish_reason == "abort":
        counts["cancelled"] += 1
        assert found.token_ids == plain.token_ids[:length], name
        return
    same = found.token_ids == plain.token_ids
    if not batch_invariant() and not (same and _are_near(found, plain)):
        counts["outputs that differ by rounding"] += 1
        return
    assert same, name
    for field in ("text", "finish_reason", "stop_reason"):
        assert getattr(found, field) == getattr(plain, field), (name, field)
    if batch_invariant():
        assert found.logprobs == plain.logprobs, name
        assert found.prompt_logprobs == plain.prompt_logprobs, name


def _are_near(found: RequestOutput, plain: RequestOutput) -> bool:
    """Return True if log-probabilities are those of the same keys and experts, within rounding."""
    pairs = zip(found.logprobs or (), plain.logprobs or (), strict=True)
    return all(abs(one.score.logprob - other.score.logprob) <= TOLERANCE for one, other in pairs)


if __name__ == "__main__":
    report.main(__doc__, "groups", 200, run_groups)
