#!/usr/bin/env bash
# Tiny drafters written by the library that publishes them, and its own forward pass against ours, in an environment of its own (some
# 2 GB, a few minutes).
#   tests/checkpoints/run_publishers.sh [ENVIRONMENT] [options of run_publishers.py]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
environment=${1:-$root/.venv-publishers}
shift $(($# < 1 ? $# : 1))
if [ ! -x "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet torch==2.13.0 speculators==0.9.0 nvidia-modelopt==0.47.0 requests
    # They come with it and do not fit its torch.
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio
fi
# The libraries warn of versions that their own authors have not tried together.
PYTHONWARNINGS=ignore PYTHONPATH="$root" exec "$environment/bin/python" "$root/tests/checkpoints/run_publishers.py" "$@"
