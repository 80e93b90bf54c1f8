"""A fed selection replaces our own: at its row and position alone, for every chunk size.

Near ties are rare, and our side often falls on the reference's side of them by chance. So the
live test feeds all selections of the reference to a model whose own selections are all wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fd_dsa.attention.host import HostAttention
from tests.parity.cases import CASES
from tests.parity.choices import Choice
from tests.parity.engine_side import load_model, make_runner, prompt_logits
from tests.parity.feeding import feeding

CASE = CASES["glm-types"]
LENGTHS = (63, 40, 65)
ROW, POSITION = 1, 30
# the first keys and the last experts, which neither layer 0 nor layer 1 takes by itself
FIRST_KEYS = Choice("indexer", 0, POSITION, tuple(range(CASE.config["index_topk"])))
LAST_EXPERTS = Choice("router", 1, POSITION, (5, 6, 7))
ABSENT = Choice("router", 1, 64, (5, 6, 7))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of the case, its weights loaded."""
    return load_model(CASE.write(Path(tmp_path_factory.mktemp("feeding"))))


def run(model: Any, choices: dict[int, list[Choice]], chunk: int) -> list[np.ndarray]:
    """Logits of the prompts of `LENGTHS`, fed with `choices`."""
    runner = make_runner(model)
    with feeding(runner, choices):
        return prompt_logits(runner, [CASE.prompt(n) for n in LENGTHS], chunk)


@pytest.mark.parametrize("choice", [FIRST_KEYS, LAST_EXPERTS], ids=lambda choice: choice.kind)
def test_only_the_fed_token_and_those_after_it_change(model: Any, choice: Choice) -> None:
    own, fed = run(model, {}, 64), run(model, {ROW: [choice]}, 7)
    for row in (0, 2):
        np.testing.assert_allclose(fed[row], own[row], atol=1e-5)
    np.testing.assert_allclose(fed[ROW][:POSITION], own[ROW][:POSITION], atol=1e-5)
    assert np.abs(fed[ROW][POSITION] - own[ROW][POSITION]).max() > 1e-3


def test_a_choice_that_never_comes_up_is_an_error(model: Any) -> None:
    with pytest.raises(AssertionError, match="not fed"):
        run(model, {ROW: [ABSENT]}, 64)


@contextmanager
def wrong_selections(model: Any) -> Iterator[None]:
    """Every indexer prefers the keys with the worst scores, every gate experts at random."""
    own = HostAttention.select

    def worst(self: Any, step: Any, q: Any, weights: Any, cache: Any) -> Any:
        return own(self, step, q, weights * -1.0, cache)

    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(HostAttention, "select", worst))
        for layer in model.layers:
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None:
                bias = rng.standard_normal(gate.num_experts).astype(np.float32)
                stack.enter_context(mock.patch.object(gate, "bias", bias))
        yield


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["v32-yarn-groups", "glm-types", "glm-pattern-groups"])
@pytest.mark.parametrize("chunk", [64, 7])
def test_selections_of_the_reference_make_up_for_wrong_ones(
    tmp_path: Path, name: str, chunk: int
) -> None:
    from tests.parity import hugging_face

    case = CASES[name]
    model = load_model(case.write(tmp_path))
    with mock.patch.object(hugging_face, "NEAR_TIE", np.inf):
        reference = hugging_face.HuggingFaceModel(case, tmp_path).reference(65)
    bound = 1e-4 * np.abs(reference.logits).max()
    for kinds, agrees in (
        (("indexer", "router"), True),
        (("indexer",), False),
        (("router",), False),
    ):
        runner = make_runner(model)
        choices = [choice for choice in reference.undecided if choice.kind in kinds]
        with wrong_selections(model), feeding(runner, {1: choices}):
            _, found = prompt_logits(runner, [case.prompt(40), case.prompt(65)], chunk)
        assert (np.abs(found - reference.logits).max() <= bound) == agrees, kinds
