"""What a served model answers, measured: IFEval, retrieval, selection, and paired comparisons."""

from __future__ import annotations
