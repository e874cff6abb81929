#!/usr/bin/env bash
# Sets up .venv/, then runs the real experiment: a small controller learns to drive a model that nobody taught.
# It resumes wherever it was stopped. Arguments go to it: `bash scripts/real.sh --quick`, `--help` lists all.
set -euo pipefail
export MATRYOSHKA_REAL_STARTED="${MATRYOSHKA_REAL_STARTED:-$(date +%s)}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env demo llama
exec "$PYTHON" -m matryoshka.benchmarks.real_households "$@"
