"""`python -m fd_dsa.accuracy selection`: measures the indexer's selection by layer."""
