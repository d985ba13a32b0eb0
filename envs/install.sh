#!/bin/sh
# Debian's Python and the pinned packages, as Dockerfile and Apptainer definition install them.
# usage: install.sh FOLDER-OF-THE-REPOSITORY EXTRAS
# PIP_EXTRA_INDEX_URL: PyTorch's CPU index, for an image without CUDA; none: torch with CUDA.
set -eu
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates git python3 python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv /opt/venv
[ "${PIP_EXTRA_INDEX_URL:-none}" != none ] || unset PIP_EXTRA_INDEX_URL
# For what pip builds too, and so in the environment.
export PIP_CONSTRAINT="$1/envs/constraints.txt $1/envs/constraints-cuda.txt"
/opt/venv/bin/pip install --no-cache-dir -e "$1[$2]"
