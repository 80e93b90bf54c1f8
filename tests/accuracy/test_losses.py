"""Losses of a text in one pass: against naive loops, and with a narrow selection."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fd_dsa.accuracy.embedded import OpenModel, SingleSequenceRunner, open_model
from fd_dsa.accuracy.selection.topk_hook import recording
from fd_dsa.config import EngineConfig
from fd_dsa.runner import InputBatch
from tests.accuracy.broken_selectors import FewLastKeysOnly
from tests.accuracy.losses import token_losses
from tests.demo.samples import PROSE
from tests.runner.dsa import dsa_runner
from tests.runner.tiny import V32, run_rows, tiny_model, tiny_runner


def test_token_losses_of_a_tiny_model_are_those_of_its_logits() -> None:
    tokens = np.random.default_rng(0).integers(2, 50, 50).tolist()
    logits = run_rows(tiny_runner(tiny_model(V32)), [(0, tokens, 0, True)]).astype(np.float64)
    wanted = [
        math.log(sum(math.exp(v) for v in row)) - row[token]
        for row, token in zip(logits.tolist(), tokens[1:], strict=False)
    ]
    sequence = SingleSequenceRunner(tiny_runner(tiny_model(V32)))
    np.testing.assert_allclose(token_losses(sequence, tokens), wanted, rtol=0, atol=1e-4)
    # again, and after another sequence
    token_losses(sequence, tokens[::-1])
    np.testing.assert_allclose(token_losses(sequence, tokens), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 13, 49])
def test_chunks_do_not_matter(chunk: int) -> None:
    tokens = np.random.default_rng(1).integers(2, 50, 50).tolist()
    model = tiny_model(V32)
    wanted = token_losses(SingleSequenceRunner(tiny_runner(model)), tokens)
    layout = model.config.cache_layout("float32", 16)
    runner = dsa_runner(model, InputBatch(1, chunk, 4, 16), layout, 4)
    found = token_losses(SingleSequenceRunner(runner), tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_a_sequence_longer_than_the_caches_is_refused() -> None:
    sequence = SingleSequenceRunner(tiny_runner(tiny_model(V32)))
    with pytest.raises(ValueError, match="65 tokens, the caches have room for 64"):
        token_losses(sequence, [3] * 65)


def test_no_jump_at_the_selection_s_size() -> None:
    """Compare losses before, at and after index_topk with those of dense attention."""

    def losses(model: OpenModel) -> np.ndarray:
        return token_losses(model.sequence, model.tokenizer.encode(PROSE * 3))

    config = EngineConfig(device="cpu", max_model_len=512)
    model = open_model(config)
    found = losses(model)
    dense = losses(open_model(replace(config, index_topk=512)))
    difference = np.abs(found - dense)
    border = model.config.index_topk
    # loss number i is of a token after i + 1 keys: up to here every key is selected
    assert difference[:border].max() < 1e-3
    assert difference[border:].max() > 1e-5, "nothing is selected"
    # one token may miss a key that is left out; a fault moves all of them
    *others, largest = np.sort(difference[border : border + 16])
    assert max(others) < 0.1 and largest < 0.5
    with recording(model.sequence.runner, FewLastKeysOnly):
        spoiled = losses(model)
    jump = np.abs(spoiled - found)
    # only rounding: on some processors the sums of a GEMM depend on the address of its memory
    assert jump[:border].max() < 1e-4
    assert jump[border : border + 16].mean() > 1
