#!/usr/bin/env bash
# Make a base for the image out of Debian's packages alone, where no image registry can be reached: `make image-base`.
# It takes the place of python:3.11-slim-bookworm: Debian 12 and its Python 3.11.
set -euo pipefail
docker=${1:?the docker command} name=${2:?the name of the image to make}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2016  # mmdebstrap says what $1 is
mmdebstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-include=/usr/share/doc/*/copyright' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' \
    bookworm "$scratch/base.tar"
"$docker" import "$scratch/base.tar" "$name"
