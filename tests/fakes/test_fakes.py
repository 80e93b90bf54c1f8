"""The double keeps FastDeploy's contract: its trees, its names, its caches, its graphs."""

from __future__ import annotations

import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

import paddle
import pytest

from tests.fakes.trees import DEVELOP, FOLDER, OURS_ENV, TREES, installed

PACKAGE = FOLDER / "fastdeploy"


@pytest.mark.parametrize("tree", TREES.values(), ids=lambda tree: tree.name)
def test_every_module_imports_in_every_tree_and_leaves_no_trace(
    tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs only Paddle and NumPy."""
    monkeypatch.setenv("FD_PLUGINS", "somebody_else")
    before = dict(os.environ), list(sys.path), list(sys.meta_path), set(sys.modules)
    with installed(tree, {**OURS_ENV, "FD_ATTENTION_BACKEND": "APPEND_ATTN"}):
        assert os.environ["FD_PLUGINS"] == "fd_dsa"
        for path in sorted(PACKAGE.rglob("*.py")):
            parts = path.relative_to(FOLDER).with_suffix("").parts
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
        added = {name.partition(".")[0] for name in set(sys.modules) - before[3]}
    assert not added & {"torch", "triton", "transformers"}
    assert (dict(os.environ), list(sys.path), list(sys.meta_path)) == before[:3]
    assert not [name for name in sys.modules if name.partition(".")[0] == "fastdeploy"]


def test_a_replay_has_the_shapes_of_the_capture_and_the_values_of_now() -> None:
    """Memory that moved or was freed is refused."""
    with installed(DEVELOP):
        from fastdeploy import _memory
        from fastdeploy.model_executor.graph_optimization.frozen_call import FrozenCall, GraphError

        ids, cache = paddle.zeros([8], dtype="int64"), paddle.zeros([4, 64], dtype="uint8")
        lengths = paddle.zeros([4], dtype="int64")

        def step(tokens: list[int], **fields: Any) -> dict[str, Any]:
            ids.copy_(paddle.to_tensor(tokens, dtype="int64"), False)
            meta = {"attn_backend": None, "lengths": lengths, "caches": [cache], **fields}
            return {"ids_remove_padding": ids, "forward_meta": SimpleNamespace(**meta)}

        def run(ids_remove_padding: Any, forward_meta: Any) -> Any:
            return ids_remove_padding * 2 + forward_meta.lengths.sum()

        graph = FrozenCall(run, step([1, 2, 3, 4]), 1)
        lengths.fill_(1)
        # the third and fourth token are what the step before has left there
        assert graph.replay(step([5, 6])).tolist() == [14, 16, 10, 12]
        with pytest.raises(GraphError, match="lengths: lies elsewhere"):
            graph.replay(step([1], lengths=paddle.zeros([4], dtype="int64")))
        _memory.free(cache)
        with pytest.raises(GraphError, match=r"caches\[0\]: its memory was freed"):
            graph.replay(step([1]))
