"""Grammars of structured output in worker processes, which the kernel ends at their limits.

llguidance cannot be interrupted, and its limits bound neither the time nor the memory of a call:
one row of an ambiguous grammar may have millions of items. So no call runs in the engine's process.
Imports nothing heavy, because every worker starts from this package.
"""
