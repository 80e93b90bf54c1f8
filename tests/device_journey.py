"""Files of the package that a decode step enters on a device: `python -m tests.device_journey`.

Prints them as a JSON list. The device is the `fake` form of the test plug-in, which must be loaded
before Paddle, so the step runs in a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.gpu_rig import load
from tests.journey import files_entered


def main() -> None:
    """Run one request of a model of two layers, and record one of its decode steps."""
    device = load("fake").device
    from fd_dsa import LLM, SamplingParams
    from fd_dsa.config import demo_model_path
    from tools.fastdeploy_check.cut import cut

    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 64}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        cut(demo_model_path(), model, 2)
        with LLM(
            str(model),
            device=device,
            enforce_eager=True,
            num_gpu_blocks_override=4,
            speculative_config="none",
            **sizes,
        ) as llm:
            params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
            stream = llm.generate("Once", params, stream=True)
            for _ in range(2):
                next(stream)
            step = files_entered(lambda: next(stream))
            list(stream)
    print(json.dumps(sorted(step)))


if __name__ == "__main__":
    main()
