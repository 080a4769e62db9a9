#!/usr/bin/env bash
# Run a command with a Docker engine of its own, which ends with it: image/engine.sh DIRECTORY COMMAND...
set -euo pipefail
directory=$1
shift
mkdir -p "$directory"
export DOCKER_HOST=unix://$directory/socket
dockerd --iptables=false --bridge=none --data-root "$directory/data" --exec-root "$directory/exec" \
    --pidfile "$directory/pid" --host "$DOCKER_HOST" >"$directory/log" 2>&1 &
engine=$!
leave() {
    kill "$engine" 2>/dev/null || true
    wait "$engine" || true
    # It leaves the network of the machine mounted, and what is mounted cannot be removed.
    awk -v below="$(realpath "$directory")/" 'index($5, below) == 1 {print $5}' /proc/self/mountinfo | tac \
        | xargs -r umount -- || true
}
trap leave EXIT
for _ in $(seq 60); do
    if docker info >/dev/null 2>&1; then break; fi
    if ! kill -0 "$engine" 2>/dev/null; then break; fi
    sleep 1
done
docker info >/dev/null 2>&1 || { echo "dockerd: $(tail -n 1 "$directory/log")"; exit 1; }
"$@"
