"""Measurements of a model's answers: IFEval, retrieval, selection, comparisons.

Invalid input of a user (a flag, a file, a server) raises ConfigError, one line with the field, the
value and the rule. A missing device or package raises BackendUnavailable.
"""

from __future__ import annotations
