"""The double keeps FastDeploy's contract: its trees, its imports, its plug-ins, its buffers."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import paddle
import pytest

from tests.fakes.trees import (
    DEVELOP,
    FOLDER,
    OURS_ENV,
    TREES,
    UPSTREAM_ENV,
    installed,
)

PACKAGE = FOLDER / "fastdeploy"


@pytest.mark.parametrize("tree", TREES.values(), ids=lambda tree: tree.name)
def test_every_module_imports_in_every_tree(tree: Any) -> None:
    """It needs Paddle and NumPy alone."""
    with installed(tree):
        before = set(sys.modules)
        for path in sorted(PACKAGE.rglob("*.py")):
            parts = path.relative_to(FOLDER).with_suffix("").parts
            importlib.import_module(".".join(parts).removesuffix(".__init__"))
        added = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not added & {"torch", "triton", "transformers", "fd_dsa"}


def test_an_installation_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_PLUGINS", "somebody_else")
    before = dict(os.environ), list(sys.path), list(sys.meta_path)
    with installed(DEVELOP, OURS_ENV):
        import fastdeploy

        assert fastdeploy.__version__ == "0.0.0+fake"
        assert os.environ["FD_PLUGINS"] == "fd_dsa"
    assert (dict(os.environ), list(sys.path), list(sys.meta_path)) == before
    assert not [name for name in sys.modules if name.partition(".")[0] == "fastdeploy"]


def test_names_that_nobody_has_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the package they print and are None, of ForwardMeta they are None, of `envs` an error."""
    with installed(DEVELOP, {}):
        import fastdeploy
        from fastdeploy import envs
        from fastdeploy.model_executor.forward_meta import ForwardMeta

        assert hasattr(fastdeploy, "no_such_thing") and fastdeploy.no_such_thing is None
        assert "no_such_thing" in capsys.readouterr().out
        assert fastdeploy.platforms.current_platform.device_name == "gpu"
        meta = ForwardMeta(None)
        assert hasattr(meta, "slot_maping") and meta.slot_maping is None
        meta.caches = caches = [paddle.zeros([1])]
        meta.clear_caches()
        # the attribute goes, not what is in it
        assert meta.caches is None and len(caches) == 1
        assert envs.FD_ATTENTION_BACKEND == "APPEND_ATTN" and envs.FD_PLUGINS is None
        # read at every access, and not stripped
        monkeypatch.setenv("FD_PLUGINS", "a, b")
        assert envs.FD_PLUGINS == ["a", " b"]
        with pytest.raises(AttributeError):
            _ = envs.FD_NO_SUCH_VARIABLE


def test_the_backend_is_looked_up_once_by_name() -> None:
    with installed(DEVELOP):
        from fastdeploy.model_executor.layers import attention
        from fastdeploy.model_executor.layers.attention import attention_selecter

        theirs = attention.get_attention_backend()
        assert theirs is attention.DSAAttentionBackend
        attention.DSAAttentionBackend = type("Ours", (theirs,), {})
        assert attention.get_attention_backend() is theirs
        attention_selecter._get_attn_backend.cache_clear()
        assert attention.get_attention_backend() is attention.DSAAttentionBackend
    with installed(DEVELOP, {**UPSTREAM_ENV, "FD_ATTENTION_BACKEND": "NO_SUCH_ATTN"}):
        from fastdeploy.model_executor.layers.attention import get_attention_backend

        with pytest.raises(ValueError, match="Invalid attention backend"):
            get_attention_backend()
