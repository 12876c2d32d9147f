#!/usr/bin/env bash
# Several processes on this machine: one training run (to try multi-host things out, or one process per GPU), or parts of a work
# (--shard) and then what merges them.
#
#   launch/local.sh [--dry-run] COUNT --config=configs/demo.py --workdir=runs/two [--config.key=value ...]
#   launch/local.sh [--dry-run] COUNT generate|evaluate|prepare ARGUMENT...         e.g. prepare build --dataset=...
#
# On a machine with GPUs each process sees one of them. Ctrl-C reaches all: they save and end with 143.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -gt 1 ]] || usage
count=$1
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "error: COUNT '$count' is not a number of processes, as 2" >&2; exit 2; }
shift
program=train
if [[ ${1-} =~ ^(train|generate|evaluate|prepare)$ ]]; then program=$1; shift; fi
[[ $# -gt 0 && ${1-} != -h ]] || usage

python=${PYTHON:-.venv/bin/python}
port=${PORT:-$((20000 + RANDOM % 20000))}
gpus=$( (command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus 2> /dev/null || true) | wc -l)

# A signal while they are being started is kept until all are there.
asked=
early=
pids=()
tell() { if ((${#pids[@]} < count)); then early=1; else asked=1; kill -TERM "${pids[@]}" 2> /dev/null || true; fi; }
trap tell INT TERM
for ((i = 0; i < count; i++)); do
  place=("--coordinator=localhost:$port" "--process=$i" "--processes=$count")
  if [[ $program != train ]]; then place=("--shard=$i/$count"); fi
  command=("$python" -m "truepose_jax.$program" "$@" "${place[@]}")
  settings=()
  if ((gpus >= count)); then settings=("CUDA_VISIBLE_DEVICES=$i"); fi
  if [[ $dry ]]; then
    printf '%q ' "${settings[@]}" "${command[@]}"
    echo
  else
    # Away from the terminal: Ctrl-C there and the trap's signal would be two, and the second ends at once.
    env "${settings[@]}" setsid "${command[@]}" &
    pids+=($!)
  fi
done
merge=()
if [[ $program != train ]] && ((count > 1)); then merge=("$python" -m "truepose_jax.$program" "$@" --shard=merge); fi
if [[ $dry ]]; then
  if ((${#merge[@]})); then printf '%q ' "${merge[@]}"; fi
  exit 0
fi
[[ ! $early ]] || tell

# A process that dies leaves the others waiting for it: end them too, and keep its code. One that was asked to stop (143)
# is not alone in that: the others are saving and must not get a second signal.
code=0
left=$count
while ((left > 0)); do
  asked=
  found=0
  wait -n || found=$?
  if [[ $asked ]] && ((found > 128)); then continue; fi # that was the signal and not the end of a process: wait on
  left=$((left - 1))
  if ((found != 0)); then
    ((code != 0)) || code=$found
    ((found == 143)) || kill -TERM "${pids[@]}" 2> /dev/null || true
  fi
done
if ((code == 0 && ${#merge[@]})); then "${merge[@]}" || code=$?; fi
exit "$code"
