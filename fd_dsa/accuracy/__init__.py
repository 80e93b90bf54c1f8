"""What a served model answers, measured: IFEval, retrieval, selection, and paired comparisons.

Whatever a user gave and is wrong (a flag, a file, a server) raises ConfigError, one line with the
field, the value and the rule; a device or a package that is missing raises BackendUnavailable.
"""

from __future__ import annotations
