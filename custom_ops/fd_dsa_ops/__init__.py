"""Operators of fd_dsa in CUDA C++, as functions on Paddle tensors.

Built by `make custom-ops` or `pip install ./custom_ops`; see docs/custom_ops.md. A function takes
its arguments by position or by name, and answers with its outputs, those in place included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("libfd_dsa_ops.so")
# {"paddle": version, "cuda": version or None, "archs": ["sm_90", ...]} of the build
BUILD = json.loads(Path(__file__).with_name("build.json").read_text("utf-8"))


def _load() -> list[str]:
    """Register the operators with Paddle; their names.

    Raises:
        ImportError: another Paddle than that of the build, or a library that cannot be loaded.
    """
    import paddle
    from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

    cure = "build it again: make custom-ops"
    if paddle.__version__ != BUILD["paddle"]:
        raise ImportError(
            f"fd_dsa_ops was built beside Paddle {BUILD['paddle']}, this is Paddle "
            f"{paddle.__version__}, and its C++ interface changes between releases; {cure}"
        )
    try:
        return list(load_op_meta_info_and_register_op(str(LIBRARY)))
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ImportError(f"{LIBRARY}: {said[-1] if said else error!r}; {cure}") from error


def _function(name: str) -> Any:
    """A registered operator as a function."""
    from paddle import _C_ops
    from paddle.utils.cpp_extension.extension_utils import parse_op_info

    inputs, attributes, outputs = parse_op_info(name)
    names = [argument.partition("@")[0] for argument in [*inputs, *attributes]]
    optional = {argument.partition("@")[0] for argument in inputs if "@OPTIONAL" in argument}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        values = [given.get(argument) for argument in names]
        if (
            given.keys() - set(names)
            or set(names) - optional - given.keys()
            or len(args) > len(names)
        ):
            raise TypeError(f"{name} takes {', '.join(names)}; got {len(args)} and {list(kwargs)}")
        found = _C_ops._run_custom_op(name, *values)
        return found[0] if len(outputs) == 1 else tuple(found)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{name}({', '.join(names)}); see docs/custom_ops.md."
    return call


__all__ = _load()
globals().update({name: _function(name) for name in __all__})
