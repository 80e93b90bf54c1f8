"""Engines of the double with our plug-in in it, found through its entry points.

with ours(): engine = make_engine()
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fd_dsa.config import demo_model_path
from tests.fakes.driver import Engine
from tests.fakes.trees import DEVELOP, OURS_ENV, Tree, installed
from tests.fastdeploy_plugin.launcher import plugin_folder

# without the overlap schedule a call of the worker is a step, and none comes after the last token
SMALL = {
    "max_model_len": 256,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 4,
    "enable_overlap_schedule": False,
}


@contextmanager
def ours(tree: Tree = DEVELOP) -> Iterator[None]:
    """A tree with our path in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = plugin_folder(Path(folder) / "site")
        with installed(tree, OURS_ENV, path=[path]):
            yield


def make_engine(num_gpu_blocks: int = 24, **overrides: Any) -> Any:
    """An engine with the demo model."""
    return Engine(demo_model_path(), num_gpu_blocks, **{**SMALL, **overrides})


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of the demo model."""
    return np.random.default_rng(seed).integers(10, 4000, num_tokens).tolist()
