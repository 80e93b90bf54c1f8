"""The FastDeploy trees that the double can stand for, and the way to install one for a test.

A tree is a record of the variants found in FastDeploy's public branches from release/2.4 to
develop in May 2026; a variant stands beside the file that has it. The modules of the double ask
`fastdeploy._tree.current()` for the record. It travels in an environment variable, so processes
that a test starts see the same tree.
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
FAKE_MODULES = ("fastdeploy", "flash_mla", "deep_gemm", "trees")

# what a test sets to drive upstream's code alone, or ours in its place
UPSTREAM_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "none_of_these"}
OURS_ENV = {"FD_ATTENTION_BACKEND": "DSA_ATTN", "FD_PLUGINS": "fd_dsa"}


@dataclass(frozen=True)
class Tree:
    """One FastDeploy tree; the defaults are those of develop."""

    name: str
    # the runner makes a backend for each layer (#8041), the step's is the first
    backend_per_layer: bool = True
    # layers/attention/dsa_attention_backend.py and DeepSeek-V3.2 in models/deepseek_v3.py (#6689)
    has_dsa: bool = True
    # the runner's buffers: "dict", or "input_batch" (worker/input_batch.py)
    share_inputs: str = "input_batch"
    # "flag": _prepare_inputs(is_dummy_or_profile_run) -> None; "counts": (cached_token_num,
    # cached_real_bsz, is_dummy_or_profile_run) -> (token_num, event)
    prepare_inputs: str = "counts"
    # the model is called with "keywords", or with ("dict", forward_meta)
    model_call: str = "dict"
    # ForwardMeta.__getattr__ gives None for what is missing, and sets it
    forward_meta_getattr: bool = True
    # "argument": the model's pre_process hands positions to the layers; "model": it stores them in
    # ForwardMeta; "runner": the runner does, after init_attention_metadata (#7367)
    position_producer: str = "runner"
    # the positions' dtype: int32, int64 with the fused operator
    position_dtype: str = "int64"
    # ForwardMeta.mask_encoder_batch and the operator's fifth argument (dropped by #7313, #7367)
    mask_encoder_batch: bool = False
    # name of the operator that makes positions; with the mask it takes five tensors, else four
    position_op: str = "get_position_ids_and_slot_mapping"
    # slot_mapping "layer": made twice in every layer; "runner": once a step (#7367)
    slot_mapping: str = "runner"
    # indexer_attn_mask_offsets made by init_attention_metadata (#7598)
    mask_offsets: bool = False
    # cu_seqlens_k holds prefix sums of "query" lengths (same as cu_seqlens_q), or of "key" lengths
    cu_seqlens_k: str = "key"
    # rows of the lengths and tables in ForwardMeta: all "slots", or the "running" ones
    rows: str = "running"
    # 2: lengths are [S, 1]; 1: [S]
    seq_lens_rank: int = 1
    # padding_cudagraph_inputs puts the full buffer in seq_lens_this_time's place (#3457)
    padding_swaps_seq_lens: bool = False
    # get_block_shape_and_split_kv_block "returns" seven tensors, or writes "in_place"
    split_kv_block: str = "in_place"
    max_len_entries: int = 6
    # fd_config.enable_rope_3d_runtime, else model_config.rope_3d
    rope_3d_runtime: bool = True
    # enable_compat_on_triton_kernel: "guard" a launch, "no_torch" (#6913), "driver_swap" (#6897)
    triton_wrapper: str = "driver_swap"
    # plugins/utils.py without FD_PLUGINS loads "all" or "none"
    plugins_unset: str = "none"
    # plugins/model_register keeps a `plugins_loaded`
    register_once: bool = True
    # plugins/model_runner: a second call gives None
    runner_once: bool = True
    # plugins/model_runner asserts that there is "==1" or "<=1" plug-in
    runner_assertion: str = "<=1"
    # further groups than the two: input processor, token processor, parsers
    more_plugin_groups: bool = True
    # only ENABLE_V1_KVCACHE_SCHEDULER=1 is supported
    v1_scheduler_only: bool = True
    # kinds of steps that run as graphs: "decode", or "prefill" and mixed ones too
    graphs: str = "prefill"
    graph_opt_level: int = 0
    # the overlap schedule launches more tokens than there are
    overlap_schedule: bool = True
    # caches are attached from the cache manager when CPU blocks or a storage are configured
    cache_offload: bool = True
    # aliases paddle.compat.*_torch_proxy are used (gone from newer Paddle, #78923)
    compat_aliases: bool = False
    # the indexer's k_norm in models/deepseek_v3.py: "rms" in the first trees, else "layer"
    k_norm: str = "layer"
    # forward_mixed makes a contiguous copy of the latent cache for FlashMLA, later a view
    latent_cache_copy: bool = False
    # the release of DeepGEMM: "bundled", or "2026" (kernels/deep_gemm.py)
    deep_gemm: str = "bundled"
    # names that fastdeploy.model_executor.ops.gpu lacks
    missing_ops: tuple[str, ...] = ()
    # what no plug-in can know: see BROKEN
    defect: str = ""


DEVELOP = Tree("develop")
PR7367 = replace(
    DEVELOP,
    name="pr7367",
    backend_per_layer=False,
    position_dtype="int32",
    position_op="get_position_ids_and_mask_encoder_batch",
    cu_seqlens_k="query",
    rows="running",
    graphs="decode",
    overlap_schedule=False,
    more_plugin_groups=False,
    plugins_unset="all",
    rope_3d_runtime=False,
)
EARLY = replace(
    PR7367,
    name="early",
    share_inputs="dict",
    prepare_inputs="flag",
    model_call="keywords",
    forward_meta_getattr=False,
    position_producer="model",
    mask_encoder_batch=True,
    slot_mapping="layer",
    rows="slots",
    seq_lens_rank=2,
    padding_swaps_seq_lens=True,
    triton_wrapper="guard",
    register_once=False,
    runner_once=False,
    runner_assertion="==1",
    v1_scheduler_only=False,
    cache_offload=False,
    compat_aliases=True,
    k_norm="rms",
    latent_cache_copy=True,
)
R24 = replace(
    EARLY,
    name="r24",
    has_dsa=False,
    position_producer="argument",
    split_kv_block="returns",
    max_len_entries=9,
)
TREES = {tree.name: tree for tree in (R24, EARLY, PR7367, DEVELOP)}

BROKEN = {
    # models/deepseek_v3.py has no class Indexer
    "missing_symbol": replace(DEVELOP, name="missing_symbol", defect="missing_symbol"),
    # the backend's constructor takes num_kv_heads where all other trees take kv_num_heads
    "constructor": replace(DEVELOP, name="constructor", defect="constructor"),
    # forward_mixed takes one argument more
    "forward_mixed": replace(DEVELOP, name="forward_mixed", defect="forward_mixed"),
    # get_kv_cache_shape gives two shapes
    "cache_shape": replace(DEVELOP, name="cache_shape", defect="cache_shape"),
    # the import of layers/attention/dsa_attention_backend.py raises
    "raising_import": replace(DEVELOP, name="raising_import", defect="raising_import"),
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
