#!/usr/bin/env bash
# Several processes on this machine as one training run: to try multi-host things out, or one process per GPU.
#
#   launch/local.sh [--dry-run] COUNT --config=configs/demo.py --workdir=runs/two [--config.key=value ...]
#
# On a machine with GPUs each process sees one of them. Ctrl-C reaches all: they save and end with 143.
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
count=${1-}
[[ $count =~ ^[1-9][0-9]*$ ]] || usage
shift
[[ $# -gt 0 ]] || usage

python=${PYTHON:-.venv/bin/python}
port=${PORT:-$((20000 + RANDOM % 20000))}
gpus=$( (command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus 2> /dev/null || true) | wc -l)

pids=()
for ((i = 0; i < count; i++)); do
  command=("$python" -m truepose_jax.train "$@" "--coordinator=localhost:$port" "--process=$i" "--processes=$count")
  settings=()
  if ((gpus >= count)); then settings=("CUDA_VISIBLE_DEVICES=$i"); fi
  if [[ $dry ]]; then
    printf '%q ' "${settings[@]}" "${command[@]}"
    echo
  else
    env "${settings[@]}" "${command[@]}" &
    pids+=($!)
  fi
done
[[ ! $dry ]] || exit 0

# A process that dies leaves the others waiting for it: end them too, and keep its code.
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' INT TERM
code=0
for ((i = 0; i < count; i++)); do
  wait -n || {
    found=$?
    ((code != 0)) || code=$found
    kill -TERM "${pids[@]}" 2> /dev/null || true
  }
done
exit "$code"
