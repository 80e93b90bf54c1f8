"""The pages in a browser: the one to talk to the model, and /docs."""
