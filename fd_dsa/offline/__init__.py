"""Offline inference: a model in the caller's process, without a server."""
