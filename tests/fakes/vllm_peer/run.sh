#!/bin/bash
# Stand-in for the folder that --peer names: `run.sh python SCRIPT ...` runs a script with vLLM's packages.
[ "$1" = python ] || exit 2
shift
PYTHONPATH=$(cd "$(dirname "$0")" && pwd) exec python3 "$@"
