"""Fields of config.json that describe quantised weights: blocks of FP8, and matrices in four bits.

Source: config.json as written by NVIDIA ModelOpt 0.47, llm-compressor 0.14, AutoRound 0.16,
GPTQModel 7.7 and AutoAWQ; SGLang's W4AFP8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fd_dsa.models.config_reader import FieldReader, as_integer
from fd_dsa.models.packing import AWQ, COMPRESSED_INT4, COMPRESSED_NVFP4, GPTQ, MODELOPT, W4AFP8

_NAME = "quantization_config"
# fd_dsa's own field, for a model in which only the MTP layer is FP8
_MTP_NAME = "mtp_quantization_config"
_FORMATS = None, "mixed-precision", "nvfp4-pack-quantized", "pack-quantized", "float-quantized"
_OTHERS = "vLLM or SGLang may serve it; fd_dsa serves the model's FP8 or bfloat16 release"


def read_quantization(reader: FieldReader) -> dict[str, Any]:
    """Read the formats of quantised weights. Empty without any.

    Returns:
        `packing` if matrices may have four bits, `weight_block_size` and `round_scales` if others
        may have FP8.
    """
    found: dict[str, Any] = {}
    if (section := reader.section(_NAME)) is not None:
        method = section.choice("quant_method", None, ("fp8", *_METHODS), _OTHERS)
        found = _METHODS.get(method, read_fp8)(section)
    if (section := reader.section(_MTP_NAME)) is not None:
        layer = read_fp8(section)
        size = found.get("weight_block_size", layer["weight_block_size"])
        if layer["weight_block_size"] != size:
            value = reader.raw(_MTP_NAME)
            raise reader.error(_MTP_NAME, value, f"blocks of {size}, as in {_NAME}")
        found = layer | found
    return found


def with_formats(data: dict[str, Any], formats: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the `quantization_config` that hf_quant_config.json stands for.

    ModelOpt writes the second file. Older versions leave the object out of config.json. Experts in
    INT4 beside FP8 are MIXED_PRECISION there, and `fp8` in config.json.
    """
    given, found = data.get(_NAME), formats.get("quantization")
    if given is None and isinstance(found, dict):
        return data | {_NAME: {"quant_method": "modelopt"} | found}
    mixed = isinstance(found, dict) and found.get("quant_algo") == "MIXED_PRECISION"
    if mixed and isinstance(given, dict) and given.get("quant_method") == "fp8":
        return data | {_NAME: given | {"quant_method": "w4afp8"}}
    return data


def read_fp8(section: FieldReader, expert_dtypes: Sequence[str] = ("fp8",)) -> dict[str, Any]:
    """Read block size and kind of scales from one object.

    Args:
        expert_dtypes: supported types of routed experts.
    """
    section.choice("quant_method", None, ("fp8",))
    section.choice("activation_scheme", "dynamic", ("dynamic",))
    section.choice("expert_dtype", "fp8", expert_dtypes)
    return _read_blocks(section)


def _read_blocks(section: FieldReader, name: str = "weight_block_size") -> dict[str, Any]:
    """Read block size and kind of scales of FP8 weights.

    Args:
        name: field of the block size.
    """
    section.choice("fmt", "e4m3", ("e4m3",))
    scale_fmt = section.choice("scale_fmt", None, (None, "ue8m0", "float"))
    size = section.raw(name, [128, 128])
    blocks = [as_integer(n) or 0 for n in size] if isinstance(size, (list, tuple)) else []
    if len(blocks) != 2 or min(blocks) < 1:
        raise section.error(name, size, "two integers of at least 1")
    return {"weight_block_size": (blocks[0], blocks[1]), "round_scales": scale_fmt == "ue8m0"}


def _read_w4afp8(section: FieldReader) -> dict[str, Any]:
    """Read SGLang's W4AFP8: experts in INT4, other matrices in blocks of FP8."""
    # static scales are those of activations in FP8, which a CPU does not have
    section.choice("activation_scheme", "dynamic", ("dynamic", "static"))
    packing = replace(W4AFP8, group_size=_group_size(section, 128))
    return _read_blocks(section) | {"packing": packing}


def _read_awq(section: FieldReader) -> dict[str, Any]:
    """Read AWQ, whose words hold eight rows of a matrix."""
    symmetric = not section.boolean("zero_point", not section.boolean("sym", False))
    section.choice("version", "gemm", ("gemm", "GEMM"))
    return {"packing": replace(AWQ, group_size=_int4_group(section), symmetric=symmetric)}


def _read_gptq(section: FieldReader) -> dict[str, Any]:
    """Read GPTQ, whose words hold eight columns of a matrix."""
    section.choice("pack_dtype", "int32", ("int32",))
    kind = section.choice("checkpoint_format", section.raw("format", "gptq"), ("gptq", "gptq_v2"))
    section.choice("format", kind, (kind,), "checkpoint_format says otherwise")
    rules = section.raw("dynamic") or {}
    # rules that exclude modules show in the stored tensors, too
    if not isinstance(rules, dict) or not all(str(rule).startswith("-:") for rule in rules):
        raise section.error("dynamic", rules, "rules -:… that exclude modules", _OTHERS)
    packing = replace(
        GPTQ,
        group_size=_int4_group(section),
        zero_offset=int(kind == "gptq"),
        symmetric=section.boolean("sym", True),
        has_groups=section.boolean("desc_act", False),
    )
    return {"packing": packing}


def _read_auto_round(section: FieldReader) -> dict[str, Any]:
    """Read AutoRound, which packs as AWQ or GPTQ."""
    layers = section.raw("extra_config") or {}
    for name, one in layers.items() if isinstance(layers, dict) else [("", layers)]:
        if not isinstance(one, dict) or as_integer(one.get("bits", 4)) not in (4, 16, 32):
            raise section.error(f"extra_config.{name:.80}", one, "bits 4, 16 or 32", _OTHERS)
    kinds = {"auto_round:auto_gptq": replace(GPTQ, zero_offset=1), "auto_round:auto_awq": AWQ}
    kind = section.choice("packing_format", "auto_round:auto_gptq", (*kinds,), _OTHERS)
    size, symmetric = _int4_group(section), section.boolean("sym", True)
    return {"packing": replace(kinds[kind], group_size=size, symmetric=symmetric)}


def _read_modelopt(section: FieldReader) -> dict[str, Any]:
    """Read NVIDIA ModelOpt's NVFP4."""
    section.choice("quant_algo", None, ("NVFP4",), _OTHERS)
    section.choice("group_size", 16, (16,))
    # one group, which repeats the other fields
    section.raw("config_groups")
    return {"packing": MODELOPT}


def _read_compressed(section: FieldReader) -> dict[str, Any]:
    """Read the groups of modules of compressed-tensors."""
    section.choice("quantization_status", "compressed", ("compressed",))
    section.choice("format", None, _FORMATS, _OTHERS)
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        # rotations of weights change results
        section.choice(name, {}, ({}, None), _OTHERS)
    listed, groups = section.raw("config_groups"), section.section("config_groups")
    found: dict[str, Any] = {}
    for name in listed or ():
        group = groups and groups.section(name)
        weights = group and group.section("weights")
        if not group or not weights:
            raise section.error(f"config_groups.{name}", listed[name], "an object with weights")
        group.choice("format", None, _FORMATS, _OTHERS)
        for key, value in _read_weights(weights).items():
            if found.setdefault(key, value) != value:
                raise group.error("weights", group.raw("weights"), "one 4-bit format", _OTHERS)
        # the stored tensors show which modules a group has
        for unused in ("targets", "input_activations", "output_activations"):
            group.raw(unused)
    if "packing" not in found:
        raise section.error("config_groups", listed, "a group of weights in 4 bits", _OTHERS)
    return found


def _read_weights(weights: FieldReader) -> dict[str, Any]:
    """Read the format of the weights of one group of compressed-tensors."""
    for name in ("observer", "observer_kwargs", "scale_dtype", "zp_dtype"):
        weights.raw(name)
    weights.choice("dynamic", False, (False,))
    # groups of columns that are no neighbours were removed from compressed-tensors
    weights.choice("actorder", None, (None, "weight", "static"), _OTHERS)
    symmetric, size = weights.boolean("symmetric", True), weights.raw("group_size")
    kind = tuple(weights.raw(name) for name in ("type", "num_bits", "strategy"))
    if kind == ("float", 8, "block") and symmetric:
        return _read_blocks(weights, "block_structure")
    weights.choice("block_structure", None, (None,))
    if kind[:2] == ("float", 4) and size == 16 and symmetric:
        return {"packing": COMPRESSED_NVFP4}
    if kind in (("int", 4, "group"), ("int", 4, "channel")):
        packing = replace(
            COMPRESSED_INT4,
            group_size=_group_size(weights) if kind[2] == "group" else None,
            zero_offset=None if symmetric else 0,
        )
        return {"packing": packing}
    got = f"{kind[0]} of {kind[1]} bits, {kind[2]}, group_size {size}, symmetric {symmetric}"
    served = "float of 4 bits in groups of 16, int of 4 bits, float of 8 bits in blocks"
    raise weights.error("type", got, served, _OTHERS)


def _int4_group(section: FieldReader) -> int | None:
    """Read the group size of 4-bit integers, and refuse other weights."""
    section.choice("bits", None, (4,), _OTHERS)
    section.choice("data_type", "int", ("int",), _OTHERS)
    return _group_size(section)


def _group_size(section: FieldReader, default: int | None = None) -> int | None:
    """Read the values of a row with one scale. -1 = the whole row, returned as None."""
    if section.raw("group_size", default) == -1:
        return None
    return section.integer("group_size", default)


_METHODS: dict[str, Callable[[FieldReader], dict[str, Any]]] = {
    "auto-round": _read_auto_round,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    "gptq": _read_gptq,
    "modelopt": _read_modelopt,
    "w4afp8": _read_w4afp8,
}
