#!/bin/sh
# One or several TPU slices of a GKE cluster through xpk:
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-b tools/pods/xpk.sh qwen2-jax doctor
#
# TYPE (default v5litepod-16), SLICES (default 1) and WORKLOAD (its name) may be set too. xpk puts this folder into an
# image of Python 3.12; the command behind the script's name runs on every host of every slice. A cluster with such
# slices is made once: xpk cluster create --cluster=... --tpu-type=... --num-slices=...
set -eu
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || { echo "$0: a command is needed" >&2; exit 2; }

command=
for word in "$@"; do    # each word quoted for the shell of the container
    command="$command '$(printf %s "$word" | sed "s/'/'\\\\''/g")'"
done

exec xpk workload create \
    --cluster="${CLUSTER:?name the GKE cluster}" --project="${PROJECT:?name the project}" \
    --zone="${ZONE:?name the zone}" --workload="${WORKLOAD:-qwen2-jax}" \
    --tpu-type="${TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" \
    --base-docker-image=python:3.12 --script-dir=. \
    --command="pip install --quiet '.[tpu]' && QWEN2_JAX_COORDINATOR=auto$command"
