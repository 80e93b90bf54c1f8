"""OpenAI-compatible HTTP server over the embedded engine; start with `python -m fd_dsa.serve`."""
