#!/usr/bin/env bash
# Build the image, weigh it, look into it, and run the pipeline in it: `make image-check`. Where no Docker engine answers,
# one is started for this, if that can be done; else a line says what is missing, and all is well.
#
# With an engine of its own, the run has a network of its own, in which there is nothing but its MLflow and S3.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

skip() {
    echo "the image was not built: $1"
    exit 0
}

# A client that can build with BuildKit: with its plugin, or old enough to have it inside.
docker=
while read -r candidate; do
    if DOCKER_BUILDKIT=1 "$candidate" build --help 2>/dev/null | grep -q -e --secret; then docker=$candidate; break; fi
done < <(type -ap docker)
[ -n "$docker" ] || skip "there is no docker command with BuildKit"

engine=()
alone=()
if ! "$docker" info >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || skip "no Docker engine answers, and only root can start one"
    command -v dockerd >/dev/null || skip "no Docker engine answers, and there is no dockerd"
    engine=(image/engine.sh "$scratch/engine")
    said=$("${engine[@]}" true) || skip "$said"
    if command -v ip >/dev/null && unshare --net true 2>/dev/null; then
        alone=(unshare --net sh -c 'ip link set lo up && exec "$@"' sh)
    fi
fi

if ! "${engine[@]}" "$docker" image inspect "$BASE" >/dev/null 2>&1 \
    && ! "${engine[@]}" "$docker" pull --quiet "$BASE" >/dev/null 2>&1; then
    command -v mmdebstrap >/dev/null || skip "there is no base $BASE, and no mmdebstrap to make one"
    "${engine[@]}" image/base.sh "$docker" "$BASE" >"$scratch/log" 2>&1 \
        || skip "there is no base $BASE, and none could be made: $(tail -n 1 "$scratch/log")"
    echo "$BASE: made from Debian's packages"
fi

"${engine[@]}" make --no-print-directory image DOCKER="$docker" >"$scratch/log" 2>&1 || { tail -n 30 "$scratch/log"; exit 1; }
"${engine[@]}" "$PYTHON" image/sizes.py --docker "$docker" --image "$IMAGE"
"${engine[@]}" .venv/bin/pytest -q tests/test_image.py --image "$IMAGE"
read -r MLFLOW_PORT S3_PORT < <(.venv/bin/python -c "from moeprune.services.ports import free_ports; print(*free_ports(2))")
export MLFLOW_PORT S3_PORT
"${alone[@]}" "${engine[@]}" make --no-print-directory image-run STATE="$scratch/state"
