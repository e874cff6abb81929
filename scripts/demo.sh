#!/usr/bin/env bash
# Sets up .venv/ with what the embedded default needs, then runs the whole pilot loop on it and writes its report.
# Arguments go to the demo: `bash scripts/demo.sh --seed 1`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env demo
exec "$PYTHON" -m matryoshka.scripts.demo "$@"
