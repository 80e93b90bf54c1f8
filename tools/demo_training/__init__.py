"""Trains the demo model of fd_dsa: synthetic data, tokenizer, training, export, measurements."""
