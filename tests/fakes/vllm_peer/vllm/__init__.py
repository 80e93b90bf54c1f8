"""A double of vLLM 0.26 for tests: the names and arguments that the load benchmark uses.

Every module stands for the file of the same path. Defaults and orders are vLLM's, so a call with an
unknown name fails as it would there. Answers are token ids at a steady pace.
"""

from vllm.sampling_params import SamplingParams

__all__ = ["SamplingParams"]
__version__ = "0.26.0"

# vLLM too logs to the standard output while it is imported
print("INFO: a line of vLLM's log", flush=True)
