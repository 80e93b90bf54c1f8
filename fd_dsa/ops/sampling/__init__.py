"""Sampling on a device: from logits to token ids with nothing read back."""
