"""The recipes of docs/integrations.md, against a server of the demo model."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.serve.processes import environment, serving

PAGE = (Path(__file__).resolve().parent.parent / "docs/integrations.md").read_text("utf-8")
URL = "http://127.0.0.1:8000"
RECIPES = {
    "langchain_openai": "langchain-openai",
    "llama_index.llms.openai_like": "llama-index-llms-openai-like",
    "litellm": "litellm",
}


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server on the demo model."""
    with serving(tmp_path_factory.mktemp("server"), "--device", "cpu") as server:
        yield server.url


def _is_installed(module: str) -> bool:
    """Return True if a module can be found. Packages above it are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("module", RECIPES)
def test_a_recipe_answers_whole_and_streamed(module: str, server_url: str, tmp_path: Path) -> None:
    if not _is_installed(module):
        pytest.skip(f"{RECIPES[module]} is not installed: pip install '.[integrations]'")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)
    (source,) = (block for block in blocks if re.search(rf"(from|import) {module}\b", block))
    done = subprocess.run(
        [sys.executable, "-c", source.replace(URL, server_url)],
        cwd=tmp_path,
        # the price list of litellm, which it would download
        env={**environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    whole, streamed = done.stdout.splitlines()
    assert "Paris" in whole
    assert ("Rome" if "Italy" in source else "Paris") in streamed


def test_the_page_has_a_recipe_for_each_package() -> None:
    for package in RECIPES.values():
        assert f"`.venv/bin/pip install {package}`" in PAGE
    (proxy,) = re.findall(r"(?ms)^```yaml\n(.*?)^```", PAGE)
    assert yaml.safe_load(proxy)["model_list"][0]["litellm_params"]["api_base"] == f"{URL}/v1"
