"""The worker process of a GPU."""
