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
DTYPE_VARIABLE = "FAKE_FASTDEPLOY_DTYPE"
V1_VARIABLE = "ENABLE_V1_KVCACHE_MANAGER"
FAKE_MODULES = ("fastdeploy", "flash_mla", "deep_gemm", "trees")

# what a test sets to drive upstream's code alone, or ours in its place
UPSTREAM_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "none_of_these"}
OURS_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}


@dataclass(frozen=True)
class Tree:
    """One FastDeploy tree; the defaults are those of develop in June 2026.

    Where nothing else is said, a variant was read in `worker/gpu_model_runner.py` and
    `layers/attention/dsa_attention_backend.py` at 39d329f2.
    """

    name: str
    # the runner makes a backend for each layer, the step's is the first (#8041)
    backend_per_layer: bool = True
    # DSAAttentionBackend.forward_static, and V0 caches of the model's dtype (#8060)
    sliding_windows: bool = True
    # ENABLE_V1_KVCACHE_MANAGER: caches by `create_kv_cache` of each backend (#7787)
    v1_cache_manager: bool = True
    # the operator that makes positions, int32 from four tensors; the fused one of a branch
    # (custom_ops/gpu_ops, not in the runner at 39d329f2) makes int64 and the slots
    position_op: str = "get_position_ids_and_mask_encoder_batch"
    # indexer_attn_mask_offsets made by init_attention_metadata (#7598, 8f8e7cf6)
    mask_offsets: bool = False
    # cu_seqlens_k holds prefix sums of "query" lengths (same as cu_seqlens_q), or of "key" lengths
    cu_seqlens_k: str = "key"
    # enable_compat_on_triton_kernel: "guard" a launch, "no_torch" (#6913), "driver_swap" (#6897)
    triton_wrapper: str = "driver_swap"
    # plugins/utils.py without FD_PLUGINS loads "all" (fa9f8a9b) or "none" (10d585c4)
    plugins_unset: str = "none"
    # plugins/model_runner asserts that there is "==1" or "<=1" plug-in
    runner_assertion: str = "<=1"
    # kinds of steps that run as graphs: "decode", or "prefill" and mixed ones too
    graphs: str = "prefill"
    # the overlap schedule launches more tokens than there are
    overlap_schedule: bool = True
    # the release of DeepGEMM: "bundled", or "2026" (kernels/deep_gemm.py)
    deep_gemm: str = "bundled"
    # what no plug-in can know: see BROKEN
    defect: str = ""

    @property
    def position_dtype(self) -> str:
        """Of `position_ids_buffer`, as the operator fills it."""
        return "int64" if self.position_op == FUSED_OP else "int32"


FUSED_OP = "get_position_ids_and_slot_mapping"
DEVELOP = Tree("develop")
FUSED = replace(DEVELOP, name="fused", position_op=FUSED_OP)
# as a release branch has it by #7638, April 2026
PR7367 = replace(
    DEVELOP,
    name="pr7367",
    backend_per_layer=False,
    sliding_windows=False,
    v1_cache_manager=False,
    cu_seqlens_k="query",
    graphs="decode",
    overlap_schedule=False,
    plugins_unset="all",
)
TREES = {tree.name: tree for tree in (PR7367, DEVELOP, FUSED)}

BROKEN = {
    defect: replace(DEVELOP, name=defect, defect=defect)
    for defect in (
        # the model makes positions in a `pre_process` of its own, as before #7367
        "before_7367",
        # models/deepseek_v3.py has no class Indexer
        "missing_symbol",
        # the backend's constructor takes num_kv_heads where all other trees take kv_num_heads
        "constructor",
        # forward_mixed takes one argument more
        "forward_mixed",
        # get_kv_cache_shape gives two shapes
        "cache_shape",
        # the import of layers/attention/dsa_attention_backend.py raises
        "raising_import",
    )
}


def environment(
    tree: Tree,
    env: Mapping[str, str | None] | None = None,
    place: str = "cpu",
    dtype: str = "float32",
    path: Iterable[str] = (str(FOLDER), str(FOLDER / "kernels")),
) -> dict[str, str | None]:
    """Variables that make this tree current in this process and those it starts; None unsets."""
    ours = [name for name in os.environ if name.startswith("FD_DSA_")]
    return {
        **{name: None for name in os.environ if name.startswith("FD_") and name not in ours},
        TREE_VARIABLE: json.dumps(asdict(tree)),
        PLACE_VARIABLE: place,
        DTYPE_VARIABLE: dtype,
        "PYTHONPATH": os.pathsep.join(filter(None, [*path, os.environ.get("PYTHONPATH")])),
        # V0 caches of the newest trees are none of DSA's
        V1_VARIABLE: "1" if tree.v1_cache_manager else None,
        **(UPSTREAM_ENV if env is None else env),
    }


@contextmanager
def installed(
    tree: Tree,
    env: Mapping[str, str | None] | None = None,
    *,
    place: str = "cpu",
    dtype: str = "float32",
    kernels: bool = True,
    path: Iterable[str | Path] = (),
) -> Iterator[Tree]:
    """FastDeploy's double on sys.path inside the block, freshly imported by whoever imports it.

    Args:
        tree: which tree it stands for.
        env: variables to set, None to unset one; UPSTREAM_ENV without it. All other variables
            of FastDeploy's are unset inside the block; FD_DSA_* stay as they are.
        place, dtype: where the double's tensors lie, and the activations' dtype.
        kernels: whether its flash_mla and deep_gemm can be imported too.
        path: further entries of sys.path, such as a folder of `plugin_distribution`.

    Yields:
        the tree. Modules, sys.path, sys.meta_path and the environment are afterwards as before.
    """
    path_before, finders_before = list(sys.path), list(sys.meta_path)
    _purge()
    entries = [str(FOLDER), *([str(FOLDER / "kernels")] if kernels else []), *map(str, path)]
    sys.path[:0] = entries
    try:
        with _environment(environment(tree, env, place, dtype, entries)):
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
