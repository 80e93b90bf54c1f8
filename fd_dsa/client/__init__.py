"""Terminal clients for OpenAI-compatible servers: chat, load tests, batches."""
