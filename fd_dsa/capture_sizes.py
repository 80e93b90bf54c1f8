"""Sizes of the steps that a GPU captures: the defaults, and the check of given ones."""

from __future__ import annotations

from collections.abc import Sequence

from fd_dsa.errors import ConfigError, flag_error

PROMPT_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Numbers of tokens of steps with prompts. The device bounds larger steps, not their launches."""
_MAX_DECODE = 512


def decode_sizes(max_tokens: int) -> tuple[int, ...]:
    """Return the numbers of rows of captured decode steps, ascending.

    Args:
        max_tokens: maximum number of tokens of a decode step.
    """
    largest = min(max_tokens, _MAX_DECODE)
    # the same sizes as vLLM
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, _MAX_DECODE, 16))
    return (*(size for size in sizes if size < largest), largest)


def checked_sizes(
    name: str, sizes: object, least: int, most: int, why: str, *, is_eager: bool
) -> tuple[int, ...]:
    """Return given sizes in ascending order, each one once.

    Args:
        name: name of the field.
        least, most: bounds of a size.
        why: reason for `most`, and the cure.
        is_eager: True if no step is captured.

    Raises:
        ConfigError: a size is not allowed, or there is none.
    """
    if isinstance(sizes, (str, bytes, bytearray)) or not isinstance(sizes, Sequence):
        raise flag_error(name, sizes, "several integers")
    if is_eager:
        raise ConfigError(
            f"--{name.replace('_', '-')}: got {list(sizes)} together with --enforce-eager, "
            "which disables graphs; give one of them"
        )
    for size in sizes:
        if type(size) is not int or not least <= size <= most:
            raise flag_error(name, size, f"integers from {least} to {most}, {why}")
    if not sizes:
        raise flag_error(name, [], "at least one integer", "or take --enforce-eager")
    return tuple(sorted(set(sizes)))
