"""Packages of other projects: found without an import, imported in Paddle's scope, told once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import paddle
import pytest

from fd_dsa.errors import BackendUnavailable
from fd_dsa.ops import _provider, _third_party
from fd_dsa.ops._provider import provider_reason, provider_table
from fd_dsa.ops._third_party import is_installed, load, settle, third_party_table

# what imports torch finds Paddle under that name
SOURCE = "import torch\nrelu = torch.nn.functional.relu\n"


@pytest.fixture(autouse=True)
def nothing_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package was tried, and no choice made, before this test."""
    monkeypatch.setattr(_third_party, "_settled", {})
    monkeypatch.setattr(_third_party, "_told", set())
    monkeypatch.setattr(_provider, "_choices", {})
    monkeypatch.setattr(_provider, "_against", {})


class NoTorch:
    """A machine without torch, whether it is installed or not."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`kernels_a` and `kernels_b`, which import torch, in a process whose scopes are put back."""
    for name in ("kernels_a", "kernels_b"):
        (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    finder = paddle.compat.proxy.TORCH_PROXY_FINDER
    # a test may put another list in its place, and this one comes back after the test
    meta_path = sys.meta_path
    before = list(meta_path), set(finder._local_enabled_scope), finder._globally_enabled
    torch = imported("torch")
    forget(torch)
    meta_path.insert(0, NoTorch())
    yield
    meta_path[:], finder._local_enabled_scope, finder._globally_enabled = before
    forget(imported("torch", "kernels_a", "kernels_b"))
    sys.modules.update(torch)


def imported(*packages: str) -> dict[str, Any]:
    """The modules of these packages that this process has imported."""
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] in packages}


def forget(modules: dict[str, Any]) -> None:
    """Have them imported anew by whoever asks."""
    for name in modules:
        del sys.modules[name]


def finders() -> list[Any]:
    """Paddle's finders."""
    return [f for f in sys.meta_path if type(f).__name__ == "TorchProxyMetaFinder"]


def test_installed_is_asked_without_an_import(packages: None) -> None:
    assert is_installed("kernels_a") and not is_installed("kernels_of_nobody")
    assert "kernels_a" not in sys.modules
    assert not is_installed("kernels_of_nobody.inner")


def test_a_module_of_none_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels_a", None)
    assert not is_installed("kernels_a")


def test_torch_is_paddle_inside_the_package_and_nowhere_else(packages: None) -> None:
    module = load("kernels_a", paddle.zeros([1]))
    assert module.relu is paddle.nn.functional.relu
    # where torch is installed, it is torch
    with suppress(ModuleNotFoundError):
        assert __import__("torch").nn.functional.relu is not paddle.nn.functional.relu


def test_the_scope_is_set_once(packages: None) -> None:
    tensor = paddle.zeros([1])
    for name in ("kernels_a", "kernels_b", "kernels_a"):
        assert load(name, tensor).relu is paddle.nn.functional.relu
        (finder,) = finders()
    assert finder._local_enabled_scope >= {"kernels_a", "kernels_b"}


def test_another_scope_stays(packages: None) -> None:
    paddle.enable_compat(scope={"kernels_b"}, silent=True)
    load("kernels_a", paddle.zeros([1]))
    (finder,) = finders()
    assert finder._local_enabled_scope >= {"kernels_a", "kernels_b"}
    paddle.disable_compat()
    assert finders() == []


def test_a_scope_of_the_package_is_enough(packages: None) -> None:
    paddle.enable_compat(scope={"kernels_a"}, silent=True)
    before = list(sys.meta_path)
    load("kernels_a", paddle.zeros([1]))
    assert sys.meta_path == before


def test_posing_everywhere_goes_on(packages: None) -> None:
    paddle.enable_compat(silent=True)
    before = list(sys.meta_path)
    assert load("kernels_a", paddle.zeros([1])).relu is paddle.nn.functional.relu
    (finder,) = finders()
    assert finder._globally_enabled and sys.meta_path == before


def test_a_finder_of_an_unknown_release_is_left_alone(
    packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TorchProxyMetaFinder:
        def find_spec(self, *args: Any) -> None:
            return None

    monkeypatch.setattr(sys, "meta_path", [TorchProxyMetaFinder(), *sys.meta_path])
    before = list(sys.meta_path)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        load("kernels_a", paddle.zeros([1]))
    assert sys.meta_path == before


def test_tensors_of_torch_need_no_scope(packages: None, tmp_path: Path) -> None:
    tensor = type("Tensor", (), {"__module__": "torch"})()
    (tmp_path / "kernels_a.py").write_text("x = 1\n")
    assert load("kernels_a", tensor).x == 1
    assert finders() == []


def test_older_names_of_the_scope(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(paddle, "enable_compat")
    assert load("kernels_a", paddle.zeros([1])).relu is paddle.nn.functional.relu
    monkeypatch.delattr(paddle.compat, "enable_torch_proxy")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f not in finders()])
    with pytest.raises(BackendUnavailable, match=r"kernels_b: Paddle .* cannot pose"):
        load("kernels_b", paddle.zeros([1]))


def test_a_finding_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fd_dsa"):
        for _ in range(3):
            settle("sparse_mla", "gpu", "flash_mla", "144 heads, it takes up to 128")
            settle("indexer_logits", "gpu", "deep_gemm", "RuntimeError: no nvcc", failed=True)
        settle("sparse_mla", "gpu", "flash_mla", "agrees", serves=True)
    levels = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert levels == [
        (
            "INFO",
            "sparse_mla on gpu: flash_mla is left out, our kernel serves "
            "(144 heads, it takes up to 128)",
        ),
        (
            "WARNING",
            "indexer_logits on gpu: deep_gemm failed, our kernel serves (RuntimeError: no nvcc)",
        ),
        ("INFO", "sparse_mla on gpu: flash_mla serves (agrees)"),
    ]
    assert [(x.operator, x.serves) for x in third_party_table()] == [
        ("indexer_logits", False),
        ("sparse_mla", True),
    ]


def test_the_table_names_the_package_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_provider, "_choices", {("sparse_mla", "gpu"): "triton"})
    settle("sparse_mla", "gpu", "flash_mla", "not installed")
    assert provider_table() == {"sparse_mla": {"gpu": "triton"}}
    settle("sparse_mla", "gpu", "flash_mla", "agrees", serves=True)
    assert provider_table() == {"sparse_mla": {"gpu": "flash_mla"}}
    assert provider_reason("flash_mla") == "installed, and agrees with our kernel"
