"""Oracles: plain loops written for obviousness, with no import from fd_dsa."""
