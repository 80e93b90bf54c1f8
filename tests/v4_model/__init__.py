"""DeepSeek-V4: the model, its caches and the engine over them."""
