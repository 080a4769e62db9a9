#!/usr/bin/env bash
# Build the image, weigh it, look into it and run the pipeline in it: `make image-check`. Where there is no Docker
# engine, one is started for this and ended again, if that can be done; else a line says what is missing, and all is well.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
engine=
leave() {
    if [ -n "$engine" ]; then kill "$engine" && wait "$engine" || true; fi
    rm -rf "$scratch"
}
trap leave EXIT

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

answers() { "$docker" info >/dev/null 2>&1; }
if ! answers; then
    [ "$(id -u)" = 0 ] || skip "no Docker engine answers, and only root can start one"
    command -v dockerd >/dev/null || skip "no Docker engine answers, and there is no dockerd"
    export DOCKER_HOST=unix://$scratch/socket
    dockerd --iptables=false --bridge=none --data-root "$scratch/data" --exec-root "$scratch/exec" \
        --pidfile "$scratch/pid" --host "$DOCKER_HOST" >"$scratch/log" 2>&1 &
    engine=$!
    for _ in $(seq 60); do
        if answers || ! kill -0 "$engine" 2>/dev/null; then break; fi
        sleep 1
    done
    answers || skip "dockerd does not start: $(tail -n 1 "$scratch/log")"
fi

if ! "$docker" image inspect "$BASE" >/dev/null 2>&1 && ! "$docker" pull --quiet "$BASE" >/dev/null 2>&1; then
    command -v mmdebstrap >/dev/null || skip "there is no base $BASE, and no mmdebstrap to make one"
    image/base.sh "$docker" "$BASE" >"$scratch/base.log" 2>&1 \
        || skip "there is no base $BASE, and none could be made: $(tail -n 1 "$scratch/base.log")"
    echo "$BASE: made from Debian's packages"
fi

make --no-print-directory image DOCKER="$docker" >"$scratch/build.log" 2>&1 || { tail -n 30 "$scratch/build.log"; exit 1; }
"$PYTHON" image/sizes.py --docker "$docker" --image "$IMAGE"
.venv/bin/pytest -q tests/test_image.py --image "$IMAGE"
read -r MLFLOW_PORT S3_PORT < <(.venv/bin/python -c "from moeprune.services.ports import free_ports; print(*free_ports(2))")
export MLFLOW_PORT S3_PORT
make --no-print-directory image-run STATE="$scratch/state"
