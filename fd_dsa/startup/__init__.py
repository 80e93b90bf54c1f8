"""Start of an engine: plan, weights, memory, warm-up, and measurement of drafts.

`build.build_engine` goes through the phases in this order. Nothing here runs once requests are
served, except `ranks`, which watches the processes of the other ranks.
"""
