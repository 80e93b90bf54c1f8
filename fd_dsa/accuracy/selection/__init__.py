"""`python -m fd_dsa.accuracy selection`: what the indexer chose, layer by layer."""
