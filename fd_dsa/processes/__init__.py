"""Processes that this package starts: ranks, the engine of a server, compilers of grammars.

`parent` starts and watches a child; `child` is the first call of the child's program. A child gets
a connection to its parent, leaves signals to the parent, and ends with it.
"""
