#!/usr/bin/env bash
# The tests and benchmarks that need a GPU, with the packages that are here: nothing is installed, nothing downloaded.
#   bash scripts/gpu_check.sh [--model FOLDER] [--data FILE] [--out FOLDER] [--dry-run]
#   bash scripts/gpu_check.sh --call 1 --limit-s 420   then   --call 2 --limit-s 360: thirteen minutes, in order of worth
# PYTHON=/path/to/python chooses the interpreter; torch, triton and the run-time packages must be in it, peers may be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mkdir -p .ns
[ -e .ns/matryoshka ] || ln -sfn .. .ns/matryoshka
export PYTHONPATH="$PWD/.ns${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m matryoshka.benchmarks.gpu_check "$@"
