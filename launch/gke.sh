#!/usr/bin/env bash
# A training run on GKE as a JobSet, on TPU slices or GPU nodes, or other work that its pods share.
#
#   launch/gke.sh [--dry-run] tpu NAME IMAGE TYPE TOPOLOGY -- --config=... --workdir=gs://... [--config.key=value ...]
#   launch/gke.sh [--dry-run] gpu NAME IMAGE NODES GPUS_PER_NODE -- --config=... --workdir=... [...]
#   launch/gke.sh [--dry-run] tpu|gpu ... -- generate|evaluate|prepare ARGUMENT...       e.g. prepare build --dataset=...
#
# TYPE and TOPOLOGY as in the node pool's labels: tpu-v5-lite-podslice 4x4, tpu-v6e-slice 4x8, tpu-v5p-slice 2x2x4. --dry-run
# prints the JobSet. A pod that is preempted or fails restarts all of them; each start goes on from the saved step.
# Needs kubectl and the JobSet controller in the cluster (https://jobset.sigs.k8s.io).
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -ge 7 && $6 == -- ]] || usage
kind=$1 name=$2 image=$3 fourth=$4 fifth=$5
shift 6
program=train
if [[ $1 =~ ^(train|generate|evaluate|prepare)$ ]]; then program=$1; shift; fi
[[ $# -gt 0 ]] || usage
[[ $name =~ ^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$ ]] || { echo "error: NAME '$name' must be lower-case letters, digits and -" >&2; exit 2; }

# The arguments as a JSON list, which is YAML too.
arguments=
for argument in "$@"; do
  argument=${argument//\\/\\\\}
  arguments+="${arguments:+, }\"${argument//\"/\\\"}\""
done

case $kind in
  tpu)
    [[ $fifth =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || { echo "error: TOPOLOGY '$fifth' is not like 4x4 or 2x2x4" >&2; exit 2; }
    chips=$((${fifth//x/*}))
    per_host=4
    if ((chips == 1)); then per_host=1; elif ((chips == 8)) && [[ $fourth != *v5p* ]]; then per_host=8; fi
    hosts=$((chips / per_host))
    extra=()
    if ((hosts > 1)); then extra=(--distributed=always); fi
    selector="cloud.google.com/gke-tpu-accelerator: $fourth
              cloud.google.com/gke-tpu-topology: $fifth"
    resource="google.com/tpu: $per_host"
    environment=
    ;;
  gpu)
    [[ $fourth =~ ^[1-9][0-9]*$ && $fifth =~ ^[1-9][0-9]*$ ]] || usage
    hosts=$fourth
    extra=()
    selector="cloud.google.com/gke-gpu: \"true\""
    resource="nvidia.com/gpu: $fifth"
    environment="
              env:
              - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-workers-0-0.$name:1234\"}
              - {name: JAX_NUM_PROCESSES, value: \"$hosts\"}
              - name: JAX_PROCESS_ID
                valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
    ;;
  *) usage ;;
esac
for argument in "${extra[@]}"; do arguments+=", \"$argument\""; done

jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy: {maxRestarts: 100}
  replicatedJobs:
  - name: workers
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              $selector
            containers:
            - name: train
              image: $image
              command: [python, -m, truepose_jax.$program]
              args: [$arguments]
              resources: {limits: {$resource}}$environment"

if [[ $dry ]]; then
  echo "$jobset"
else
  echo "$jobset" | kubectl apply -f -
fi
