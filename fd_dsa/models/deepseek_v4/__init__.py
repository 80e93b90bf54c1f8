"""DeepSeek-V4: configuration, checkpoint names, layers and model."""
