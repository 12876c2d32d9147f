#!/usr/bin/env bash
# A training run on every worker of a Cloud TPU slice (one process per worker; JAX reads its place from the slice).
#
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE setup [GIT_URL]            once: the repository and its packages, on every worker
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE train --config=... --workdir=/mnt/runs/a [--config.key=value ...]
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE generate|evaluate|prepare ARGUMENT...      a part on every worker; when all are
#                                                                          done, the same with --shard=merge, on the first
#   launch/tpu_pod.sh [--dry-run] TPU_NAME ZONE stop                       save and end what train, ... of this script started
#
# A folder such as /mnt must be one that every worker has mounted (Filestore, or a bucket by gcsfuse for what is only read).
# PYTHON= names the workers' Python 3.11 or later (python3); setup says what to install where it is older.
# The run goes on when this shell goes: its output is in ~/truepose-jax/train.log (generate.log, ...) of each worker.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -ge 3 ]] || usage
name=$1 zone=$2 what=$3
shift 3
workers=all

case $what in
  setup)
    url=${1-$(git config --get remote.origin.url || true)}
    [[ $url ]] || { echo "error: no GIT_URL given and this clone has no remote" >&2; exit 2; }
    python=$(printf %q "${PYTHON:-python3}")
    advice="this worker's $python is no Python 3.11 or later; install one (sudo apt-get install -y python3.11 python3.11-venv)"
    advice+=" and run setup again with PYTHON=python3.11"
    remote="{ $python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \"error: $advice\" >&2; exit 2; }; }"
    remote+=" && { [ -e truepose-jax/.git ] || git clone $(printf %q "$url") truepose-jax; } && cd truepose-jax"
    remote+=" && $python -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
    ;;
  train | generate | evaluate | prepare)
    [[ $# -gt 0 ]] || usage
    arguments=$(printf '%q ' "$@")
    remote="cd truepose-jax && "
    if [[ $what == train ]]; then
      arguments+="--distributed=always "
    elif [[ " $*" == *" --shard="* ]]; then
      workers=0 # --shard=merge, or one part again
    else # which part of how many this worker is, as the slice's metadata say
      remote+="of() { curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/\$1; }; "
      remote+="export JAX_PROCESS_ID=\$(of agent-worker-number) && "
      remote+="export JAX_NUM_PROCESSES=\$(of worker-network-endpoints | tr ',' '\\n' | grep -c .) && "
    fi
    # The subshell writes its own number down and becomes the program: `stop` ends that process and nobody else's.
    remote+="{ echo \$BASHPID > $what.pid; exec setsid nohup .venv/bin/python -m truepose_jax.$what "
    remote+="$arguments> $what.log 2>&1 < /dev/null; } & sleep 5; tail -n 3 ~/truepose-jax/$what.log"
    ;;
  stop)
    # A number that another program has by now is not ours.
    remote="found=; for file in truepose-jax/*.pid; do pid=\$(cat \$file 2> /dev/null) || continue; "
    remote+="if tr '\\0' ' ' < /proc/\$pid/cmdline 2> /dev/null | grep -q \"truepose_jax.\$(basename \$file .pid)\"; "
    remote+="then kill -TERM \$pid && found=1; fi; done; [ \$found ] || echo 'nothing was running'"
    ;;
  *) usage ;;
esac

command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" "--worker=$workers" "--command=$remote")
if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
