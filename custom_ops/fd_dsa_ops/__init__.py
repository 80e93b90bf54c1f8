"""The CUDA C++ operators of fd_dsa as functions on Paddle tensors.

`make custom-ops` or `pip install ./custom_ops` builds them. See docs/custom_ops.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).with_name("libfd_dsa_ops.so")
# {"paddle": version, "cuda": version or None, "archs": ["sm_90", ...]} of the build
BUILD = json.loads(Path(__file__).with_name("build.json").read_text("utf-8"))


def _load() -> list[str]:
    """Register the operators with Paddle and return their names.

    Raises:
        ImportError: Paddle differs from that of the build, or the library cannot be loaded.
    """
    import paddle
    from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

    if paddle.__version__ != BUILD["paddle"]:
        raise ImportError(
            f"fd_dsa_ops was built beside Paddle {BUILD['paddle']}, this is Paddle "
            f"{paddle.__version__}, and its C++ interface changes between releases"
        )
    try:
        return list(load_op_meta_info_and_register_op(str(LIBRARY)))
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ImportError(f"{LIBRARY}: {said[-1] if said else error!r}") from error


def get_position_ids_and_mask_encoder_batch(
    seq_lens_encoder: Any, seq_lens_decoder: Any, seq_lens_this_time: Any, position_ids: Any
) -> Any:
    """Write the position of each token of a step.

    See docs/custom_ops.md.

    Args:
        seq_lens_encoder: the argument of PaddlePaddle/FastDeploy #7367, which is not read.
        seq_lens_decoder: int32 [num_rows], tokens of each row before the step.
        seq_lens_this_time: int32 [num_rows], tokens of each row in the step.
        position_ids: int32 [num_tokens], written in place and returned.

    Raises:
        OSError: a tensor does not fit the others; no position is written.
    """
    from paddle import _C_ops

    tensors = seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, position_ids
    return _C_ops._run_custom_op("get_position_ids_and_mask_encoder_batch", *tensors)[0]


__all__ = _load()
