#!/usr/bin/env bash
# The whole job on a real model, told step by step. usage: demo.sh MODEL_DIRECTORY
set -euo pipefail
model=$1
here=$(cd "$(dirname "$0")" && pwd)
work=build/demo
rm -rf "$work"
mkdir -p "$work"

tell() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() {
  printf '\033[36m$'
  printf ' %s' "$@"
  printf '\033[0m\n'
  "$@"
}

tell "1. A checkpoint: SmolLM2-135M-Instruct, 135 million parameters in five shards. One scalar of it:"
run swsurgery inspect "$model" --tensor model.layers.11.mlp.down_proj.weight --at 507,1229

tell "2. What is published about this family? Only the row is known there, not the scalar."
run swsurgery lookup smollm2-135m

tell "3. The plan for zeroing that one scalar. Nothing is written yet."
run cat "$here/zero-one-scalar.yaml"
run swsurgery apply "$here/zero-one-scalar.yaml" --base "$model" --dry-run

tell "4. The surgery: two bytes change, and the model is run with and without them (under a minute on a laptop)."
run swsurgery apply "$here/zero-one-scalar.yaml" --base "$model" -o "$work/patched"

tell "5. The same comparison on a prompt of your own."
run swsurgery check "$work/patched" --prompt "The largest planet of the solar system is"

tell "6. The proof. It needs no base: with the old bytes put back, every file has the base's sha256."
run swsurgery verify "$work/patched"

tell "7. Which scalars differ? (diff answers 1 where any does.)"
run swsurgery diff "$model" "$work/patched" || test $? -eq 1

tell "8. And back: the base again, byte for byte."
run swsurgery revert "$work/patched" -o "$work/reverted"
run diff -r "$model" "$work/reverted"

tell "Done. The patched checkpoint and its registry (swsurgery.json) are in $work/patched."
