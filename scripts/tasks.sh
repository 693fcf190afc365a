#!/usr/bin/env bash
# Run four methods on every kind of task with real data, into results/tasks: small models, few
# rounds, one seed. DATA holds the data sets; DECODER is a small decoder (stories260k, 512 tokens).
#   DATA=/data DECODER=/models/stories260k bash scripts/tasks.sh [NAME...]
set -euo pipefail
: "${DATA:?folder with sst2, mrpc, copa, squad, dolly, medquad, brain_tumor}" "${DECODER:?a decoder}"
out=${OUT:-results/tasks}
methods=lora,fedsa_lora,fedtt,scl
common="num_clients=3 num_rounds=8 evaluation.every=4 evaluation.max_client_rows=40 data.max_validation_rows=200"

run() {
  local name=$1
  shift
  # shellcheck disable=SC2086
  fedpeft compare --methods "$methods" data="$name" data.path="$DATA/$name" $common "$@" \
    run_dir="$out/$name"
}

encoder() { run "$@" partition.alpha=0.5 local_steps=10; }
decoder() {
  run "$@" model=local model.path="$DECODER" partition.alpha=0.1 local_steps=20 \
    data.max_length=256 data.max_test_rows=100
}
vision() {
  run "$@" model=vit_base model.random=true partition.alpha=0.1 local_steps=20 batch_size=32 \
    'model.architecture={model_type:vit,hidden_size:128,num_hidden_layers:4,num_attention_heads:4,intermediate_size:256,image_size:64,patch_size:8}'
}

for name in "${@:-sst2}"; do
  case $name in
    sst2 | mrpc | copa) encoder "$name" ;;
    medquad | dolly | squad) decoder "$name" ;;
    brain_tumor) vision "$name" ;;
    *) echo "unknown task $name" >&2 && exit 2 ;;
  esac
done
