#!/usr/bin/env bash
# Trains on all workers of a TPU VM pod.
#
#   NAME=pod ZONE=us-west4-a MODEL=models/qwen3-4b DATA=data/train.jsonl OUT=runs/qwen3-4b-v5e-256 \
#       train/launch/tpu_vm.sh configs/pods/qwen3-4b-v5e-256.toml
#
# NAME and ZONE are the TPU VM's; MODEL (a checkpoint), DATA and OUT take the places of `model`,
# `data.train` and `out` of the config. Every worker runs the same command: JAX finds the others from
# the pod's metadata. Starting it again resumes from the newest checkpoint, so these three must be on
# storage that all workers see: a mounted bucket or NFS, given as ROOT, to which they are relative.
set -euo pipefail

CONFIG=${1-}
for name in CONFIG NAME ZONE MODEL DATA OUT; do
  if [[ -z ${!name-} ]]; then
    echo "tpu_vm.sh: error: no $name (the head of this file shows a call)" >&2
    exit 2
  fi
done
ROOT=${ROOT:-/mnt/shared}        # seen by all workers
SOURCE=${SOURCE:-.}              # a checkout of this repository

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm scp --recurse "$SOURCE" "$NAME":mtd-jax --zone="$ZONE" --worker=all
on_all "cd mtd-jax && python3 -m venv ~/venv && ~/venv/bin/pip install -q -e '.[tpu,train]'"

printf -v MODEL_FILE '%q' "$OUT/model/config.json"
printf -v PLACES '%q ' --set "model=$MODEL" --set "data.train=[\"$DATA\"]" --set "out=$OUT"

# A worker that loses the others ends; all of them start again together and resume. A run that was asked
# to stop ends with exit code 0 as well: it is finished when it has written its model.
for attempt in 1 2 3 4 5; do
  if on_all "cd $ROOT && ~/venv/bin/mtd train ~/mtd-jax/$CONFIG $PLACES && test -e $MODEL_FILE"; then
    exit 0
  fi
  echo "attempt $attempt ended; starting all workers again in 30 s" >&2
  on_all "pkill -TERM -f '[v]env/bin/mtd' || true"
  sleep 30
done
exit 1
