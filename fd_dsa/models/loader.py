"""Loading of weights: checks of a checkpoint, and its tensors or random ones."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from fd_dsa.distributed import Group
from fd_dsa.errors import CheckpointError, flag_error, shorten
from fd_dsa.models.checkpoint import Checkpoint
from fd_dsa.models.config import ModelConfig
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.deepseek_v4.tensors import DSPARK, has_whole_blocks
from fd_dsa.models.dequantize import (
    BLOCK,
    FLOAT_DTYPES,
    FP4,
    FP4_GROUP,
    FP8,
    POWER,
    SCALE_SUFFIX,
    num_blocks,
)
from fd_dsa.models.expected_tensors import EXPERT, ExpectedTensor, expected_tensors
from fd_dsa.models.mla import down_projections
from fd_dsa.models.packing import UNUSED_LEAVES
from fd_dsa.models.registry import FamilyConfig
from fd_dsa.models.sources import (
    EMBEDDING,
    LM_HEAD,
    RandomTensor,
    SourceTensor,
    StoredTensor,
    WeightLoader,
)

logger = logging.getLogger(__name__)

LAYER = re.compile(r"model\.layers\.(\d+)\.")
"""Beginning of the names of a layer's tensors."""
MAX_CUT = 1 / 8
"""Max share of a model's values in FP8 weights whose blocks ranks cut.

They are held in bfloat16, which doubles their memory.
"""
_INV_FREQ = ".rotary_emb.inv_freq"
# prefix of the tensors of drafters in DeepSeek's own names
_MTP = "mtp."
# parts that only an MTP layer has
_MTP_PARTS = re.compile(r"model\.layers\.\d+\.(enorm|hnorm|eh_proj|shared_head)\.")
_INDEXER, _WK = ".self_attn.indexer.", "indexer.wk.weight"
_MAX_PROBLEMS = 3


def validate(checkpoint: Checkpoint, config: FamilyConfig) -> None:
    """Check that a checkpoint holds exactly the tensors of the model.

    Skipped with a log line are MTP layers that are not loaded, and `rotary_emb.inv_freq`. Another
    line counts the indexer tensors of layers that use the selection of an earlier layer: some
    checkpoints hold them, and no engine reads them.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or of an unsupported
            dtype, or scales of FP8 or FP4 do not fit. The message names file, tensor, expected and
            found.

    Cost: headers only. A tied head that is stored nevertheless is compared with the embedding.
    """
    expected = expected_tensors(config)
    present = set(checkpoint.names())
    layers = {name: match for name in present if (match := LAYER.match(name))}
    later = {n: m[1] for n, m in layers.items() if int(m[1]) >= config.num_hidden_layers}
    # every release has some
    mtp_layers = {layer for name, layer in later.items() if _MTP_PARTS.match(name)}
    skipped = {name for name, layer in later.items() if layer in mtp_layers}
    skipped |= {n for n in present if n.endswith(_INV_FREQ) or n.startswith(_MTP)}
    skipped -= expected.keys()
    unused = _unused_indexers(config, layers) - skipped
    packing, of_packed = config.packing, set()
    if packing is not None:
        ends = {name: name.rpartition(".")[2] for name in present - skipped}
        of_packed = {name for name, end in ends.items() if end in UNUSED_LEAVES}
    companions = {
        part
        for name in expected
        if name in present and checkpoint.info(name).dtype in (FP8, FP4, packing and packing.dtype)
        for part in checkpoint.parts(name)[1:]
    }
    tied = {LM_HEAD} if config.tie_word_embeddings else set()
    skipped -= companions
    unexpected = sorted(
        present - expected.keys() - companions - of_packed - skipped - unused - tied
    )
    problems = [*_problems(checkpoint, config, expected)]
    for name in unexpected:
        info = checkpoint.info(name)
        why = f"; num_hidden_layers is {config.num_hidden_layers}" if name in later else ""
        problems.append(
            f"{info.file}: tensor {shorten(info.name)}: unexpected, found {info.dtype} "
            f"{list(info.shape)}{why}"
        )
    problems += _tied_head_problems(checkpoint, config)
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        text = "; ".join(problems[:_MAX_PROBLEMS])
        raise CheckpointError(f"{text}; and {more} more" if more > 0 else text)
    if skipped:
        drafter = "multi-token prediction"
        if DSPARK in skipped:
            drafter = "DSpark, a drafter that is not served"
        logger.info(
            "%s: %d tensors skipped: layers from %d on (%s) and inv_freq",
            *(checkpoint.folder, len(skipped), config.num_hidden_layers, drafter),
        )
    if of_packed:
        logger.info(
            "%s: %d tensors skipped: scales of activations and caches, shapes of weights",
            checkpoint.folder,
            len(of_packed),
        )
    if unused:
        logger.info(
            "%s: %d indexer tensors skipped, of layers whose indexer is shared",
            checkpoint.folder,
            len(unused),
        )


def _unused_indexers(config: FamilyConfig, layers: Mapping[str, re.Match[str]]) -> set[str]:
    """Return the indexer tensors of layers that use an earlier layer's selection.

    Args:
        layers: match of `LAYER` for each name.
    """
    if not isinstance(config, ModelConfig):
        return set()
    shared = {str(i) for i, kind in enumerate(config.indexer_types) if kind == "shared"}
    return {
        name
        for name, match in layers.items()
        if match[1] in shared and name.startswith(_INDEXER, match.end() - 1)
    }


def load_weights(
    checkpoint: Checkpoint,
    config: FamilyConfig,
    loaders: Mapping[str, WeightLoader],
    progress: Callable[[int, int], object] = lambda done, total: None,
    group: Group | None = None,
) -> None:
    """Hand each tensor of the main model to its loader, once, in file order.

    Args:
        checkpoint: a checkpoint that `validate` has passed.
        loaders: for each name of `expected_tensors(config)`, a function that takes its
            StoredTensor. The file may be closed after the call.
        progress: called with the bytes done and all bytes, at the start and after each tensor.
        group: ranks that share the model. Each reads its own part.

    Raises:
        ValueError: `loaders` has other names.
        CheckpointError: a tensor has changed since `validate`, or a number is not finite.

    A log line counts the blocks of the rank's FP4 experts that FP8 would round.

    Cost: one pass over the files, and memory for one tensor in addition to the weights.
    """
    expected = expected_tensors(config)
    if loaders.keys() != expected.keys():
        odd = min(loaders.keys() ^ expected.keys())
        raise ValueError(
            f"loaders: got {len(loaders)} names, expected {len(expected)}; {odd!r} is only in one"
        )
    # a download may replace files between the check and the load
    if (problem := next(_problems(checkpoint, config, expected), None)) is not None:
        raise CheckpointError(f"{problem}; the folder changed during the start: start again")
    part_of, shares = rank_parts(config, group)
    packing = config.packing
    sizes = {
        name: int(checkpoint.info(name).nbytes * shares.get(name, 1))
        for name in checkpoint.names()
        if name in expected
    }
    total, done, wide, blocks = sum(sizes.values()), 0, 0, 0
    progress(done, total)
    for name, size in sizes.items():
        tensor = checkpoint.tensor(name, config.weight_block_size, packing)
        part = part_of(name, tensor)
        assert isinstance(part, StoredTensor), "the part of a StoredTensor"
        part.check_numbers()
        found = part.wide_blocks()
        wide, blocks = wide + found[0], blocks + found[1]
        loaders[name](part)
        for stored in checkpoint.parts(name):
            checkpoint.release(stored)
        done += size
        progress(done, total)
    if blocks:
        logger.info(
            "%s: FP4 experts: FP8 would round %d of %d blocks of %d x %d",
            *(checkpoint.folder, wide, blocks, BLOCK, BLOCK),
        )


def _problems(
    checkpoint: Checkpoint, config: FamilyConfig, expected: Mapping[str, ExpectedTensor]
) -> Iterator[str]:
    """Yield a message for each expected tensor that is missing or does not fit."""
    packing = config.packing
    for name, tensor in expected.items():
        if name not in checkpoint:
            yield (
                f"{checkpoint.folder}: tensor {name!r}: missing, expected shape "
                f"{list(tensor.shape)}"
            )
            continue
        info = checkpoint.info(name)
        where, shape = f"{info.file}: tensor {shorten(info.name)}", list(tensor.shape)
        quantised = [FP8] * tensor.quantisable + [FP4] * tensor.may_be_fp4
        allowed = ["I64"] if tensor.ids_below else [*FLOAT_DTYPES, *quantised]
        if packing is not None and tensor.may_be_packed:
            if info.dtype == packing.dtype:
                yield from packing.problems(name, tensor.shape, checkpoint.find)
                continue
            allowed.append(packing.dtype)
        if info.dtype == FP4 and tensor.may_be_fp4:
            # two values a byte
            shape[1] //= 2
        if info.dtype not in allowed:
            is_expert = info.dtype == FP4 and EXPERT in name
            hint = " (FP4 needs expert_dtype fp4 in config.json)" if is_expert else ""
            yield f"{where}: expected dtype {' or '.join(allowed)}, found {info.dtype}{hint}"
        elif list(info.shape) != shape:
            hint = f" (vocab_size is {config.vocab_size})" if name in (EMBEDDING, LM_HEAD) else ""
            yield f"{where}: expected shape {shape}{hint}, found {list(info.shape)}"
        elif info.dtype in quantised:
            yield from _scale_problems(checkpoint, config, name, tensor, where)


def _scale_problems(
    checkpoint: Checkpoint, config: FamilyConfig, name: str, tensor: ExpectedTensor, where: str
) -> Iterator[str]:
    """Yield a message if the scales of an FP8 or FP4 tensor are missing or do not fit."""
    info, block, allowed = checkpoint.info(name), config.weight_block_size, [*FLOAT_DTYPES, POWER]
    if info.dtype == FP4:
        block, allowed = (1, FP4_GROUP), [POWER]
    if block is None:
        yield f"{where}: found dtype {FP8}, but config.json names no blocks of FP8 weights"
        return
    expected = list(num_blocks(tensor.shape, block))
    scale_name = name + SCALE_SUFFIX
    if scale_name not in checkpoint:
        if info.name != name:
            # DeepSeek's name
            scale_name = f"{info.name.removesuffix('.weight')}.scale"
        yield f"{where}: its scales {scale_name!r} are missing, expected shape {expected}"
        return
    scale = checkpoint.info(scale_name)
    if list(scale.shape) != expected or scale.dtype not in allowed:
        yield (
            f"{scale.file}: tensor {scale.name!r}: expected {' or '.join(allowed)} {expected}, "
            f"found {scale.dtype} {list(scale.shape)}"
        )


def _tied_head_problems(checkpoint: Checkpoint, config: FamilyConfig) -> Iterator[str]:
    """Yield a message if a stored head differs from the embedding it is tied to."""
    if not config.tie_word_embeddings or not {LM_HEAD, EMBEDDING} <= set(checkpoint.names()):
        return
    if not checkpoint.are_equal(LM_HEAD, EMBEDDING):
        yield (
            f"{checkpoint.info(LM_HEAD).file}: tensor {LM_HEAD!r}: expected the values of "
            f"{EMBEDDING!r}, since tie_word_embeddings is true; found others"
        )


def load_dummy_weights(
    config: FamilyConfig,
    loaders: Mapping[str, WeightLoader],
    seed: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
    group: Group | None = None,
) -> None:
    """Hand each loader a RandomTensor.

    Args:
        progress: called with the values done and all values.
    """
    expected = expected_tensors(config)
    part_of, _ = rank_parts(config, group)
    total, done = sum(tensor.num_elements for tensor in expected.values()), 0
    for name, tensor in expected.items():
        loaders[name](part_of(name, RandomTensor(name, tensor.shape, seed, tensor.ids_below)))
        done += tensor.num_elements
        progress(done, total)


def rank_parts(
    config: FamilyConfig, group: Group | None
) -> tuple[Callable[[str, SourceTensor], SourceTensor], dict[str, float]]:
    """Return the parts of tensors that a rank holds.

    Returns:
        A function from name and tensor to the rank's part, and the fraction of each tensor that
        is split, by name.
    """
    cuts: dict[str, tuple[int, int, int]] = {}
    shares: dict[str, float] = {}
    if group is not None and group.size > 1:
        parts = expected_tensors(config.split(group.size))
        for name, tensor in expected_tensors(config).items():
            for axis, (whole, own) in enumerate(zip(tensor.shape, parts[name].shape, strict=True)):
                if own < whole:
                    cuts[name] = axis, group.rank * own, (group.rank + 1) * own
                    shares[name] = own / whole

    def part_of(name: str, tensor: SourceTensor) -> SourceTensor:
        return tensor.narrowed(*cuts[name]) if name in cuts else tensor

    return part_of, shares


def with_whole_blocks(config: FamilyConfig, size: int, fp8: frozenset[str]) -> frozenset[str]:
    """Return the tensors of `fp8` of which each of `size` ranks has whole blocks.

    All ranks hold the others in bfloat16, and a line of the log names one of them.

    Raises:
        ConfigError: the others have more than an eighth of the model's values.
    """
    expected, parts = expected_tensors(config), expected_tensors(config.split(size))
    cut = {
        name: own
        for name, tensor in expected.items()
        if name in fp8
        for whole, own in zip(tensor.shape, parts[name].shape, strict=True)
        if own < whole and own % BLOCK
    }
    if not cut:
        return fp8
    name, own = next(iter(cut.items()))
    found = f"{name!r} {list(expected[name].shape)} would be split into parts of {own}"
    num_values = sum(tensor.num_elements for tensor in expected.values())
    if sum(expected[one].num_elements for one in cut) > MAX_CUT * num_values:
        allowed = f"one that leaves each rank whole blocks of {BLOCK} of FP8 weights"
        raise flag_error("tensor_parallel_size", size, allowed, found)
    logger.warning(
        "%d FP8 weights are held in bfloat16, because %d ranks would cut their blocks of %d: %s",
        *(len(cut), size, BLOCK, found),
    )
    return fp8 - cut.keys()


def fp8_tensors(checkpoint: Checkpoint | None, config: FamilyConfig) -> frozenset[str]:
    """Return the names of the tensors that a device holds as FP8.

    Args:
        checkpoint: None = random weights, of which experts of a 4-bit format have four bits.
    """
    names = []
    for name, tensor in expected_tensors(config).items():
        if checkpoint is not None:
            info = checkpoint.find(name)
            is_fp8 = info is not None and info.dtype == FP8
        else:
            is_fp8 = tensor.quantisable and not (tensor.may_be_packed and EXPERT in name)
        if is_fp8:
            names.append(name)
    return _held(config, names)


def _held(config: FamilyConfig, names: Iterable[str]) -> frozenset[str]:
    """Return the FP8 tensors in `names` that stay FP8 on a device.

    kv_b_proj does not, because halves of its heads cross the blocks. A wk that is not among the
    first projections does not, because it shares a launch with weights_proj, which is never FP8.
    Tensors of DeepSeek-V4 do not if they would cut blocks.
    """
    if config.weight_block_size != (BLOCK, BLOCK):
        return frozenset()
    if isinstance(config, DeepseekV4Config):
        return frozenset(name for name in names if has_whole_blocks(config, name))
    found = frozenset(name for name in names if not name.endswith("kv_b_proj.weight"))
    keys = {name: name.removesuffix(_WK) for name in found if name.endswith(_WK)}
    return found - {
        name for name, prefix in keys.items() if name not in down_projections(config, prefix, found)
    }
