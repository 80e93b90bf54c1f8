"""Weights without files (`vllm/model_executor/model_loader/dummy_loader.py`)."""


def initialize_dummy_weights(model, model_config):
    """Stand for vLLM's own weights, which are all nearly 0."""
