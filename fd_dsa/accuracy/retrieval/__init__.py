"""`python -m fd_dsa.accuracy retrieval`: tests if a model finds facts in long texts."""
