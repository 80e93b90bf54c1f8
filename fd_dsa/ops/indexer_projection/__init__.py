"""The indexer's projections of the hidden states: its keys and its head weights."""
