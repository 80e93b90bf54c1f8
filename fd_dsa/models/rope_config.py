"""RoPE settings of a config.json, in both forms that Hugging Face writes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fd_dsa.models.config_reader import FieldReader

_TYPES = ("default", "yarn")
ROPE_FIELDS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "rope_type",
    "truncate",
    "type",
)
"""Fields of an object that describes RoPE, except for `rope_theta`."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Settings of rotary positions. All but `theta` apply to YaRN only.

    Attributes:
        theta: base of the frequencies.
        type: "default" or "yarn".
        factor: length of the context, as a multiple of that in pre-training.
        original_max_position_embeddings: context of the pre-training, tokens.
        beta_fast, beta_slow: rotations at which interpolation begins and is complete.
        mscale, mscale_all_dim: weights of log(factor); 0.0 = not in the file. As in
            Hugging Face, cos and sin are multiplied by mscale(mscale) / mscale(mscale_all_dim) if
            both are given, else by mscale(1); see `yarn_mscale`.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's attention multiplier, 0.1 * mscale * ln(factor) + 1, at least 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope(reader: FieldReader, rope_theta: float, max_position_embeddings: int) -> RopeConfig:
    """Read RoPE from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    Args:
        reader: the top level of config.json.
        rope_theta: default of the base of the frequencies.
        max_position_embeddings: default of YaRN's pre-training length, tokens.

    Raises:
        ConfigError: an unsupported type or value, or two places that disagree.
    """
    sections = [reader.section("rope_scaling"), reader.section("rope_parameters")]
    present = [one for one in sections if one is not None]
    theta = _agreed([reader, *present], "rope_theta", rope_theta)
    fraction = _agreed([reader, *present], "partial_rotary_factor", 1.0)
    if fraction != 1:
        raise reader.error("partial_rotary_factor", fraction, "1")
    original = _agreed(
        [reader, *present], "original_max_position_embeddings", float(max_position_embeddings)
    )
    if original != int(original):
        raise reader.error("original_max_position_embeddings", original, "an integer")
    forms = [read_section(one, theta, int(original)) for one in present]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise reader.error(
            "rope_scaling", forms[0], f"the same as rope_parameters, {forms[1]}", "remove one"
        )
    return forms[0] if forms else RopeConfig(theta=theta)


def _agreed(readers: list[FieldReader], name: str, default: float) -> float:
    """Read a positive field that may be in several places, which must agree."""
    agreed: float | None = None
    for reader in readers:
        value = _optional(reader, name)
        if value is None:
            continue
        if value <= 0 or (agreed is not None and value != agreed):
            allowed = "a number above 0" if agreed is None else f"{agreed}, as in the other place"
            raise reader.error(name, value, allowed)
        agreed = value
    return default if agreed is None else agreed


def _optional(reader: FieldReader, name: str) -> float | None:
    """Read a number. Returns None if the field is absent or null."""
    return None if reader.raw(name) is None else reader.number(name, None)


def read_section(
    reader: FieldReader, theta: float, original: int, *, has_factor: bool = False
) -> RopeConfig:
    """Read one of the two objects that describe RoPE.

    Args:
        theta: base of the frequencies.
        original: context of the pre-training, tokens.
        has_factor: True if the caller reads `attention_factor`, which otherwise must be absent.
    """
    kind = reader.choice("rope_type", reader.raw("type", "default"), _TYPES)
    reader.choice("type", kind, (kind,), "rope_type and type must agree")
    if reader.raw("rope_type") is None and reader.raw("type") is None:
        # otherwise a long context would be served without its scaling
        reader.choice("factor", None, (None, 1), "an object with a factor needs a rope_type")
    if kind == "default":
        for name in ROPE_FIELDS:
            # mark as read: files keep them without effect
            reader.raw(name)
        return RopeConfig(theta=theta)
    reader.choice("truncate", True, (True,))
    if not has_factor and reader.raw("attention_factor") is not None:
        raise reader.error(
            "attention_factor", reader.raw("attention_factor"), "null, as in released models"
        )
    factor = reader.number("factor", None)
    if factor < 1:
        raise reader.error("factor", factor, "a number of at least 1")
    if theta <= 1:
        allowed = f"'default', since rope_theta is {theta:g}"
        raise reader.error("rope_type", kind, allowed, "YaRN needs a rope_theta above 1")
    # 0 is the default, as in Hugging Face
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    given = {name: _optional(reader, name) or default for name, default in defaults.items()}
    for name, value in given.items():
        if value < 0:
            raise reader.error(name, value, "a number of at least 0")
    return RopeConfig(
        theta=theta, type=kind, factor=factor, original_max_position_embeddings=original, **given
    )
