"""`python -m fd_dsa.accuracy retrieval`: does a served model find what long prompts hide?"""
