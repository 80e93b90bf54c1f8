"""The FastDeploy trees that the double can stand for, and the way to install one for a test.

A tree is a record of the variants found in FastDeploy's public files from #7367 (April 2026) on;
each says where it was read. The modules of the double ask `fastdeploy._tree.current()` for the
record. It travels in an environment variable, so processes that a test starts see the same tree.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TREE_VARIABLE = "FAKE_FASTDEPLOY_TREE"
PLACE_VARIABLE = "FAKE_FASTDEPLOY_PLACE"
V1_VARIABLE = "ENABLE_V1_KVCACHE_MANAGER"
FAKE_MODULES = ("fastdeploy", "trees")

# what a test sets to drive upstream's code alone, or ours in its place
UPSTREAM_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "none_of_these"}
OURS_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}


@dataclass(frozen=True)
class Tree:
    """One FastDeploy tree; the defaults are those of develop in June 2026.

    Unless noted otherwise, a variant was read in `worker/gpu_model_runner.py` and
    `layers/attention/dsa_attention_backend.py` at 39d329f2.
    """

    name: str
    # the runner makes a backend for each layer, the step's is the first (#8041)
    backend_per_layer: bool = True
    # DSAAttentionBackend.forward_static, and V0 caches of the model's dtype (#8060)
    sliding_windows: bool = True
    # ENABLE_V1_KVCACHE_MANAGER: caches by `create_kv_cache` of each backend (#7787)
    v1_cache_manager: bool = True
    # of `position_ids_buffer`, which the position operator fills
    position_dtype: str = "int32"
    # plugins/utils.py without FD_PLUGINS loads "all" (fa9f8a9b) or "none" (10d585c4)
    plugins_unset: str = "none"
    # the overlap schedule launches more tokens than there are
    overlap_schedule: bool = True
    # what no plug-in can know: see BROKEN
    defect: str = ""


DEVELOP = Tree("develop")
# as a release branch has it by #7638, April 2026
PR7367 = replace(
    DEVELOP,
    name="pr7367",
    backend_per_layer=False,
    sliding_windows=False,
    v1_cache_manager=False,
    overlap_schedule=False,
    plugins_unset="all",
)
TREES = {tree.name: tree for tree in (PR7367, DEVELOP)}

BROKEN = {
    defect: replace(DEVELOP, name=defect, defect=defect)
    for defect in (
        # the model makes positions in a `pre_process` of its own, as before #7367
        "before_7367",
        # models/deepseek_v3.py has no class Indexer
        "missing_symbol",
    )
}


def environment(
    tree: Tree,
    env: Mapping[str, str | None] | None = None,
    place: str = "cpu",
    path: Iterable[str] = (str(FOLDER),),
) -> dict[str, str | None]:
    """Variables that make this tree current in this process and those it starts; None unsets."""
    ours = [name for name in os.environ if name.startswith("FD_DSA_")]
    return {
        **{name: None for name in os.environ if name.startswith("FD_") and name not in ours},
        TREE_VARIABLE: json.dumps(asdict(tree)),
        PLACE_VARIABLE: place,
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        V1_VARIABLE: None,
        **(UPSTREAM_ENV if env is None else env),
    }


@contextmanager
def installed(
    tree: Tree,
    env: Mapping[str, str | None] | None = None,
    *,
    place: str = "cpu",
    path: Iterable[str | Path] = (),
) -> Iterator[Tree]:
    """FastDeploy's double on sys.path inside the block; an import there is a fresh one.

    Args:
        tree: which tree it stands for.
        env: variables to set, None to unset one; UPSTREAM_ENV without it. All other variables
            of FastDeploy's are unset inside the block; FD_DSA_* stay as they are.
        place: where the double's tensors are.
        path: further entries of sys.path, such as a folder of `plugin_distribution`.

    Yields:
        the tree. Modules, sys.path, sys.meta_path and the environment are afterwards as before.
    """
    path_before, finders_before = list(sys.path), list(sys.meta_path)
    _purge()
    entries = [str(FOLDER), *map(str, path)]
    sys.path[:0] = entries
    try:
        with _environment(environment(tree, env, place, entries)):
            yield tree
    finally:
        sys.path[:], sys.meta_path[:] = path_before, finders_before
        _purge()


def plugin_distribution(
    folder: Path, name: str, *, register: str | None = None, runner: str | None = None
) -> Path:
    """A distribution in `folder` with one plug-in named `name`; give `folder` to sys.path.

    Args:
        register, runner: "module:callable" for the groups of models and of runners.
    """
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_plugin\nVersion: 1.0\n")
    groups = {"model_register": register, "model_runner": runner}
    (info / "entry_points.txt").write_text(
        "".join(
            f"[fastdeploy.{group}_plugins]\n{name} = {target}\n"
            for group, target in groups.items()
            if target
        )
    )
    return folder


def _purge() -> None:
    """Forget the double's modules; a real package of the same name, elsewhere, stays."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in FAKE_MODULES:
            file = getattr(module, "__file__", None) or ""
            if not file or Path(file).is_relative_to(FOLDER):
                del sys.modules[name]


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    try:
        _set_environment(values)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
