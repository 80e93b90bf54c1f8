"""OpenAI-compatible HTTP server for the embedded engine: `python -m fd_dsa.serve`."""
