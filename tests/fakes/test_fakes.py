"""The double keeps FastDeploy's contract: its trees, its imports, its plug-ins, its buffers."""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import paddle
import pytest

from fd_dsa.config import demo_model_path
from tests.fakes.sources import SOURCES, UNREAD
from tests.fakes.trees import (
    BROKEN,
    DEVELOP,
    FOLDER,
    OURS_ENV,
    TREES,
    UPSTREAM_ENV,
    installed,
    plugin_distribution,
)

PACKAGE = FOLDER / "fastdeploy"
OWN = ("sources.py",)


def _modules() -> list[str]:
    """Every module of the double, by dotted name."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("tree", TREES.values(), ids=lambda tree: tree.name)
def test_every_module_imports_in_every_tree(tree: Any) -> None:
    with installed(tree):
        for name in _modules():
            importlib.import_module(name)


def test_the_package_needs_nothing_but_paddle_and_numpy() -> None:
    with installed(DEVELOP):
        before = set(sys.modules)
        for name in _modules():
            importlib.import_module(name)
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


def test_unknown_names_of_the_package_print_and_are_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with installed(DEVELOP):
        import fastdeploy

        assert hasattr(fastdeploy, "no_such_thing") and fastdeploy.no_such_thing is None
        assert "no_such_thing" in capsys.readouterr().out
        assert fastdeploy.platforms.current_platform.device_name == "gpu"


def test_variables_are_read_at_every_access(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(DEVELOP, {}):
        from fastdeploy import envs

        assert envs.FD_ATTENTION_BACKEND == "APPEND_ATTN" and envs.FD_PLUGINS is None
        monkeypatch.setenv("FD_PLUGINS", "a, b")
        assert envs.FD_PLUGINS == ["a", " b"]
        with pytest.raises(AttributeError):
            _ = envs.FD_NO_SUCH_VARIABLE


def test_a_missing_attribute_of_forward_meta_reads_as_none() -> None:
    with installed(DEVELOP):
        from fastdeploy.model_executor.forward_meta import ForwardMeta

        meta = ForwardMeta(None)
        assert hasattr(meta, "slot_maping") and meta.slot_maping is None
        assert meta.slot_mapping is None
        meta.caches = caches = [paddle.zeros([1])]
        meta.clear_caches()
        # the attribute goes, not what is in it
        assert meta.caches is None and len(caches) == 1


def test_the_configuration_is_that_of_the_checkpoint() -> None:
    with installed(DEVELOP):
        from fastdeploy.config import fd_config

        config = fd_config(demo_model_path(), max_num_seqs=3, cudagraph_capture_sizes=[1, 6, 3])
        assert config.model_config.index_topk == 256
        assert config.model_config.architectures == ["DeepseekV32ForCausalLM"]
        assert config.scheduler_config.max_num_seqs == 3
        graphs = config.graph_opt_config
        assert graphs.cudagraph_capture_sizes == [6, 3, 1]
        assert graphs.real_shape_to_captured_size == {0: 1, 1: 1, 2: 3, 3: 3, 4: 6, 5: 6, 6: 6}
        assert config.get_max_chunk_tokens() == 512
        assert config.enable_rope_3d_runtime is False
        with pytest.raises(KeyError, match="no_such_field"):
            fd_config(demo_model_path(), no_such_field=1)


class _Plugins:
    """Entry points of a temporary distribution, and what they did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = "calls = []\ndef register():\n    calls.append('register')\n"
        source += "def runner():\n    return type('Runner', (), {})\n"
        source += "def broken():\n    raise RuntimeError('not today')\n"
        (folder / "some_plugins.py").write_text(source)

    def add(self, name: str, **targets: str) -> None:
        plugin_distribution(
            self.folder, name, **{key: f"some_plugins:{one}" for key, one in targets.items()}
        )

    def calls(self) -> list[str]:
        return sys.modules["some_plugins"].calls if "some_plugins" in sys.modules else []


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Plugins:
    monkeypatch.delitem(sys.modules, "some_plugins", raising=False)
    return _Plugins(tmp_path)


def _env(plugins: str | None) -> dict[str, str | None]:
    return {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": plugins}


def test_plugins_run_once(plugins: _Plugins) -> None:
    plugins.add("ours", register="register", runner="runner")
    with installed(DEVELOP, _env("ours"), path=[plugins.folder]):
        from fastdeploy.plugins import load_model_register_plugins, load_model_runner_plugins

        load_model_register_plugins()
        load_model_register_plugins()
        assert plugins.calls() == ["register"]
        assert load_model_runner_plugins().__name__ == "Runner"
        assert load_model_runner_plugins() is None


def test_what_fails_at_loading_is_left_out_and_what_fails_at_the_call_goes_on(
    plugins: _Plugins,
) -> None:
    plugins.add("missing", register="no_such_function")
    plugins.add("broken", register="broken")
    with installed(DEVELOP, _env("missing"), path=[plugins.folder]):
        from fastdeploy.plugins import load_model_register_plugins

        load_model_register_plugins()
    with installed(DEVELOP, _env("broken"), path=[plugins.folder]):
        from fastdeploy.plugins import load_model_register_plugins

        with pytest.raises(RuntimeError, match="not today"):
            load_model_register_plugins()


@pytest.mark.parametrize(("names", "error"), [("a,b", AssertionError), ("neither", StopIteration)])
def test_more_or_less_than_one_runner_is_an_error(
    plugins: _Plugins, names: str, error: type[Exception]
) -> None:
    plugins.add("a", runner="runner")
    plugins.add("b", runner="runner")
    with installed(DEVELOP, _env(names), path=[plugins.folder]):
        from fastdeploy.plugins import load_model_runner_plugins

        with pytest.raises(error):
            load_model_runner_plugins()


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


@pytest.mark.parametrize("name", BROKEN)
def test_broken_trees_differ_from_develop_in_one_thing(name: str) -> None:
    def looks() -> dict[str, Any]:
        from fastdeploy.model_executor.layers import attention
        from fastdeploy.model_executor.models import deepseek_v3

        backend = getattr(attention, "DSAAttentionBackend", None)
        if backend is None:
            return {"raising_import": True}
        return {
            "before_7367": hasattr(deepseek_v3.DeepseekV3ForCausalLM, "pre_process"),
            "missing_symbol": hasattr(deepseek_v3, "Indexer"),
        }

    with installed(DEVELOP):
        whole = looks()
    with installed(BROKEN[name]):
        broken = looks()
    if name == "raising_import":
        assert broken == {"raising_import": True}
    else:
        assert [key for key in whole if whole[key] != broken[key]] == [name]


def test_every_module_names_the_public_file_that_it_stands_for() -> None:
    """With its commit in `sources.py`, or as one of which no newer version could be read."""
    known = [*SOURCES, *UNREAD, "fastdeploy/model_executor/models/deepseek_v3.py"]
    for path in sorted(PACKAGE.rglob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        # parts of the double that stand for no file begin with an underscore
        files = [one for one in re.findall(r"`([\w/]+\.py)`", said) if not _is_own(one)]
        unknown = [f for f in files if not any(k.endswith(f) or f.endswith(k) for k in known)]
        assert unknown == [], path


def _is_own(file: str) -> bool:
    """Whether a file that a docstring names is one of the double's."""
    name = file.rpartition("/")[2]
    return (name.startswith("_") and name != "__init__.py") or name in OWN
