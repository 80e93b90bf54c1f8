"""A head that shares the embedding: right logits, and no copy of the embedding in a step."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from paddle.base import core

from fd_dsa.models.registry import config_from_dict, create_model
from fd_dsa.models.weights import HostWeights
from tests.models.folders import TINY, TINY_GLM

FIELDS = {"deepseek_v32": TINY, "glm_moe_dsa": TINY_GLM}
VOCAB_SIZE = 20_000


@pytest.mark.parametrize("model_type", FIELDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_without_a_copy_of_the_embedding(model_type: str, rows: int) -> None:
    fields: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
    model = create_model(config_from_dict(FIELDS[model_type] | fields), HostWeights())
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((VOCAB_SIZE, TINY["hidden_size"])).astype(np.float32)
    model.embed_tokens[...] = embedding
    hidden = rng.standard_normal((rows, TINY["hidden_size"])).astype(np.float32)
    wanted = hidden @ embedding.T
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = core.host_memory_stat_current_value("Allocated", 0)
    tracemalloc.start()
    found = model.compute_logits(hidden)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    allocated += core.host_memory_stat_peak_value("Allocated", 0) - before
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert found.nbytes <= allocated < embedding.nbytes / 2
