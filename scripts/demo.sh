#!/usr/bin/env bash
# Sets up .venv/ with what the embedded default needs, then runs the whole pilot loop on it and writes its report.
# Arguments go to the demo: `bash scripts/demo.sh --seed 1`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env demo
# What the report shows as the command: what was typed, not what runs it.
export MATRYOSHKA_TYPED="bash scripts/demo.sh${*:+ $(printf '%q ' "$@")}"
exec "$PYTHON" -m matryoshka.scripts.cli demo "$@"
