#!/usr/bin/env bash
# A training run on every worker of a Cloud TPU slice (one process per worker; JAX reads its place from the slice).
#
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE setup [GIT_URL]            once: the repository and its packages, on every worker
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE train --config=... --workdir=gs://... [--config.key=value ...]
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE generate|evaluate|prepare ARGUMENT...      e.g. prepare build --dataset=...
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE stop                       save and end, on every worker
#
# The run goes on when this shell goes: its output is in ~/truepose-jax/train.log (generate.log, ...) of each worker.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -ge 3 ]] || usage
name=$1 zone=$2 what=$3
shift 3

case $what in
  setup)
    url=${1-$(git config --get remote.origin.url || true)}
    [[ $url ]] || { echo "error: no GIT_URL given and this clone has no remote" >&2; exit 2; }
    remote="git clone $(printf %q "$url") truepose-jax && cd truepose-jax && python3 -m venv .venv"
    remote+=" && .venv/bin/pip install --quiet -e '.[tpu]'"
    ;;
  train | generate | evaluate | prepare)
    [[ $# -gt 0 ]] || usage
    arguments=$(printf '%q ' "$@")
    # Last: `prepare` wants its sub-command first.
    remote="cd truepose-jax && setsid nohup .venv/bin/python -m truepose_jax.$what $arguments--distributed=always "
    remote+="> $what.log 2>&1 < /dev/null & sleep 5; tail -n 3 ~/truepose-jax/$what.log"
    ;;
  stop) remote="pkill -TERM -f '[t]ruepose_jax.(train|generate|evaluate|prepare)' || echo 'nothing was running'" ;;
  *) usage ;;
esac

command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
