#!/usr/bin/env bash
# A training run on GKE as a JobSet, on TPU slices or GPU nodes, or parts of other work, a pod each; the same command with
# --shard=merge on one pod puts them together.
#
#   launch/gke.sh [OPTION...] tpu NAME IMAGE TYPE TOPOLOGY -- --config=... --workdir=/data/runs/a [--config.key=value ...]
#   launch/gke.sh [OPTION...] gpu NAME IMAGE NODES GPUS_PER_NODE -- --config=... --workdir=/data/runs/a [...]
#   launch/gke.sh [OPTION...] tpu|gpu ... -- generate|evaluate|prepare ARGUMENT...       e.g. prepare build --dataset=...
#   launch/gke.sh [OPTION...] cpu NAME IMAGE PODS CORES_PER_POD -- generate|evaluate|prepare ARGUMENT...
#
#   --claim=NAME:PATH        mounts that PersistentVolumeClaim at PATH in every pod (ReadWriteMany where there are several)
#   --bucket=NAME:PATH       mounts that Cloud Storage bucket at PATH, by GKE's Cloud Storage FUSE driver
#   --service-account=NAME   Kubernetes' account of the pods: one that may read and write the bucket
#   --dry-run                prints the JobSet and submits nothing
#
# TYPE and TOPOLOGY as in the node pool's labels: tpu-v5-lite-podslice 4x4, tpu-v6e-slice 4x8, tpu-v5p-slice 2x2x4. A pod that
# is preempted or dies restarts all of them, from the saved step; bad input (2) and a diverged run (1) end the JobSet.
# Needs kubectl, Kubernetes 1.31 or later and JobSet 0.10 or later in the cluster (https://jobset.sigs.k8s.io).
set -euo pipefail

usage() { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }

dry=
mounts=
volumes=
annotations=
account=
count=0
# mount WHAT NAME:PATH SOURCE...: a volume of that source (YAML) at PATH.
mount() {
  [[ $2 =~ ^[a-z0-9][-a-z0-9._]*:/[^\",:]+$ ]] || { echo "error: $1=$2 is not NAME:PATH, as in $1=data:/data" >&2; exit 2; }
  mounts+="
              - {name: storage-$count, mountPath: \"${2#*:}\"}"
  volumes+="
            - {name: storage-$count, $3}"
  count=$((count + 1))
}
while [[ ${1-} == --* ]]; do
  value=${1#*=}
  case $1 in
    --dry-run) dry=1 ;;
    --claim=*) mount --claim "$value" "persistentVolumeClaim: {claimName: \"${value%%:*}\"}" ;;
    --bucket=*)
      mount --bucket "$value" "csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: \"${value%%:*}\", mountOptions: implicit-dirs}}"
      annotations="
          metadata:
            annotations: {gke-gcsfuse/volumes: \"true\"}"
      ;;
    --service-account=*)
      [[ $value =~ ^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$ ]] || { echo "error: --service-account=$value is no account's name" >&2; exit 2; }
      account="
            serviceAccountName: $value"
      ;;
    *) usage ;;
  esac
  shift
done
[[ $# -ge 7 && $6 == -- ]] || usage
kind=$1 name=$2 image=$3 fourth=$4 fifth=$5
shift 6
program=train
if [[ $1 =~ ^(train|generate|evaluate|prepare)$ ]]; then program=$1; shift; fi
[[ $# -gt 0 ]] || usage
[[ $name =~ ^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$ ]] || { echo "error: NAME '$name' must be lower-case letters, digits and -" >&2; exit 2; }
# Into YAML goes only what can be nothing else there.
[[ $image =~ ^[a-zA-Z0-9][-a-zA-Z0-9._/:]*(@sha256:[0-9a-f]{64})?$ ]] || { echo "error: IMAGE '$image' is no image's name" >&2; exit 2; }

# The arguments as a JSON list, which is YAML too.
arguments=
for argument in "$@"; do
  [[ $argument != *[[:cntrl:]]* ]] || { echo "error: an argument holds a line break or another control character" >&2; exit 2; }
  argument=${argument//\\/\\\\}
  arguments+="${arguments:+, }\"${argument//\"/\\\"}\""
done

case $kind in
  tpu)
    [[ $fourth =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || { echo "error: TYPE '$fourth' is not like tpu-v5p-slice" >&2; exit 2; }
    [[ $fifth =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || { echo "error: TOPOLOGY '$fifth' is not like 4x4 or 2x2x4" >&2; exit 2; }
    chips=$((${fifth//x/*}))
    per_host=4
    if ((chips == 1)); then per_host=1; elif ((chips == 8)) && [[ $fourth != *v5p* ]]; then per_host=8; fi
    hosts=$((chips / per_host))
    extra=()
    if ((hosts > 1)) && [[ $program == train ]]; then extra=(--distributed=always); fi
    selector="cloud.google.com/gke-tpu-accelerator: $fourth
              cloud.google.com/gke-tpu-topology: $fifth"
    resource="google.com/tpu: $per_host"
    ;;
  gpu)
    [[ $fourth =~ ^[1-9][0-9]*$ && $fifth =~ ^[1-9][0-9]*$ ]] || usage
    hosts=$fourth
    extra=()
    selector="cloud.google.com/gke-gpu: \"true\""
    resource="nvidia.com/gpu: $fifth"
    ;;
  cpu)
    [[ $fourth =~ ^[1-9][0-9]*$ && $fifth =~ ^[1-9][0-9]*$ ]] || usage
    [[ $program != train ]] || { echo "error: cpu is for parts of other work; training takes tpu or gpu" >&2; exit 2; }
    hosts=$fourth
    extra=()
    selector="kubernetes.io/os: linux"
    resource="cpu: $fifth"
    ;;
  *) usage ;;
esac
environment=
if [[ $kind == gpu || $program != train ]]; then
  environment="
              env:
              - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-workers-0-0.$name:1234\"}
              - {name: JAX_NUM_PROCESSES, value: \"$hosts\"}
              - name: JAX_PROCESS_ID
                valueFrom: {fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
fi
for argument in "${extra[@]}"; do arguments+=", \"$argument\""; done
if [[ $volumes ]]; then
  mounts="
              volumeMounts:$mounts"
  volumes="
            volumes:$volumes"
else
  echo "warning: no --claim and no --bucket: what a pod writes is lost with it, and no other pod sees it" >&2
fi

jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
    - name: badInputOrDiverged
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: [\"failed with exit code [12] \"]
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: [\"failed with exit code 143 \", \"has condition DisruptionTarget \"]
  replicatedJobs:
  - name: workers
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - {action: FailJob, onPodConditions: [{type: DisruptionTarget, status: \"True\"}]}
          - {action: FailJob, onExitCodes: {containerName: train, operator: In, values: [1, 2, 143]}}
        template:$annotations
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300$account
            nodeSelector:
              $selector
            containers:
            - name: train
              image: \"$image\"
              command: [python, -m, truepose_jax.$program]
              args: [$arguments]
              resources: {limits: {$resource}}$environment$mounts$volumes"

if [[ $dry ]]; then
  echo "$jobset"
else
  echo "$jobset" | kubectl apply -f -
fi
