"""Grammars of structured output, in worker processes bounded by the kernel.

llguidance cannot be interrupted, and its limits bound neither the time nor the memory of a call:
one row of an ambiguous grammar may have millions of items. So no call runs in the engine's process.
This package imports only light modules, because every worker loads it.
"""
