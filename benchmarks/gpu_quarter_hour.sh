#!/usr/bin/env bash
# Nine minutes of one GPU, spent: every stage is a process with a limit of its own, what it finds is on the disk as it is found,
# and one that fails or takes too long leaves the others their time. The table comes on stdout and in OUT/table.md.
#
#   benchmarks/gpu_quarter_hour.sh OUT [PROGRAMS]
#
#   OUT        folder for what comes of it: JSON, tables, logs, the sheet, weights in float16 in pieces of 16 MiB
#   PROGRAMS   what `gpu_aot.py --keep` left: loaded where it fits, else compiled
#   DRY_RUN=1  toy sizes on the CPU, the same stages, ten times their limits: three minutes of processor time
#   STAGES     those to run, of "ceilings attention train sampling recipe pallas"; PYTHON: the interpreter
#
# The limits add up to 525 s. Pallas comes last: never run on a GPU yet, it may hang it.
set -uo pipefail
[[ $# -ge 1 ]] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
programs=
if [[ ${2-} ]]; then programs=$(cd "$2" && pwd) || exit 2; fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
stages=${STAGES-ceilings attention train sampling recipe pallas}
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$out/cache}

toy=() full=(--device=gpu --full) slack=1
recipe=(--minutes=3.2 "--config.model.unet.block_out_channels=(160, 224)" --config.data.threads=8 --config.model.dtype=bfloat16)
if [[ ${DRY_RUN-} ]]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 slack=10
  toy=(--toy) full=(--size=16x16 --widths=32 --layers=1 --repeats=2 --threads=1)
  recipe=(--minutes=0.1 --config.data.synthetic.identities=40 "--config.model.unet.block_out_channels=(8, 16)"
    "--config.model.size=(64, 48)" --config.model.carry.{head,limb_warp}=False --config.diffusion.losses.parsing=0
    --config.diffusion.steps=1)
fi

# stage NAME LIMIT COMMAND...: its output goes to OUT/NAME.log, its end into OUT/stages.jsonl.
stage() {
  local name=$1 limit=$(($2 * slack)) began=$SECONDS code=0
  shift 2
  [[ " $stages " == *" $name "* ]] || return 0
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  echo "{\"stage\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - began)), \"limit\": $limit}" >> "$out/stages.jsonl"
  echo "$name: code $code after $((SECONDS - began)) of $limit s" >&2
}

# side NAME LIMIT PROGRAM BATCH...: ours against PyTorch, eager and channels_last.
side() {
  local name=$1 limit=$2 program=$3 peers=$4
  shift 4
  stage "$name" "$limit" "$python" "benchmarks/$program.py" "${full[@]}" --peers="$peers" --repeats=5 --out="$out" \
    ${programs:+--programs="$programs"} "${@/#/--batch=}"
}

trained() {
  "$python" -m truepose_jax.demo --workdir="$out/run" --config=configs/demo.py "${recipe[@]}"
  local code=$?
  ((code <= 1)) || return "$code" # 1: a gate was missed; the sheet and the figures are there
  cp "$out/run/demo.json" "$out/recipe.json" && cp "$out/run/demo.png" "$out/recipe.png" || return
  "$python" -m truepose_jax.convert to-torch --workdir="$out/run" --dtype=float16 --dst="$out/export" &&
    tar -C "$out" -cf - export | split -b 16M - "$out/weights.tar."
}
export -f trained
export python out

batches=(12 60) few=(1 8)
if [[ ${DRY_RUN-} ]]; then batches=(1) few=(1); fi
stage ceilings 25 "$python" benchmarks/gpu_stages.py ceilings --out="$out" "${toy[@]}"
stage attention 45 "$python" benchmarks/gpu_stages.py attention --out="$out" "${toy[@]}"
side train 100 train_step eager,eager_nhwc "${batches[@]}"
side sampling 60 sampling cached_eager,cached_eager_nhwc "${few[@]}"
stage recipe 255 bash -c 'recipe=("$@"); trained' recipe "${recipe[@]}"
stage pallas 40 "$python" benchmarks/gpu_stages.py attention --name=pallas --forms=pallas_gpu --out="$out" "${toy[@]}"
"$python" benchmarks/gpu_stages.py table --out="$out" | tee "$out/table.md"
