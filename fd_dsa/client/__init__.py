"""Clients in a terminal, for any OpenAI-compatible server: `fd-dsa chat` and `fd-dsa bench`."""
