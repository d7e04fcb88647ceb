#!/usr/bin/env bash
# The whole job on a real model, told step by step. usage: demo.sh MODEL_DIRECTORY
set -euo pipefail
model=$1
work=build/demo
rm -rf "$work"
mkdir -p "$work"
export XDG_DATA_HOME="$PWD/$work/data" # what scan registers stays in the demo

tell() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() {
  printf '\033[36m$'
  for word; do # as one would type it
    case $word in *" "*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
  done
  printf '\033[0m\n'
  "$@"
}

tell "1. A checkpoint: SmolLM2-135M-Instruct, 135 million parameters in five shards. Which of them carry it?
   A few prompts are run; what makes a massive activation that persists is a candidate. Each candidate is then
   zeroed, alone and with the others, beside random scalars of the same size and other large rows of the same
   columns. Eight short windows of text are the fewest that give a verdict (two to three minutes on two cores)."
run swsurgery scan "$model" --confirm --windows 8 --window 64 \
  --manifest "$work/zero.yaml" --plot "$work/scan.png" --register smollm2-135m-instruct-demo

tell "2. The weights alone, without running anything, point to the same neurons."
run swsurgery scan "$model" --method weights

tell "3. lookup now knows what was found here, beside what is published for 39 other models."
run swsurgery lookup smollm2-135m-instruct-demo

tell "4. The manifest that scan wrote, and the plan. Nothing is changed yet."
run cat "$work/zero.yaml"
run swsurgery apply "$work/zero.yaml" --dry-run

tell "5. One of them as it lies there: its value, its bits and their place in the file. Nothing else is read but headers."
read -r tensor at < <(swsurgery apply "$work/zero.yaml" --dry-run --json --quiet | python -c '
import json, sys
splice = json.load(sys.stdin)["splices"][0]
print(splice["tensor"], ",".join(map(str, splice["index"])))')
run swsurgery inspect "$model" --tensor "$tensor" --at "$at"

tell "6. The surgery: a few bytes change, and the model is run with and without them (under a minute)."
run swsurgery apply "$work/zero.yaml" -o "$work/patched" --windows 8 --window 128

tell "7. The same comparison on a prompt of your own."
run swsurgery check "$work/patched" --windows 8 --window 128 --prompt "The largest planet of the solar system is"

tell "8. The proof. It needs no base: with the old bytes put back, every file has the base's sha256."
run swsurgery verify "$work/patched"

tell "9. Which scalars differ? (diff answers 1 where any does.)"
run swsurgery diff "$model" "$work/patched" || test $? -eq 1

tell "10. And back: the base again, byte for byte."
run swsurgery revert "$work/patched" -o "$work/reverted"
run diff -r "$model" "$work/reverted"

tell "11. Not all or nothing: quality by the factor on those scalars."
run swsurgery sweep "$work/zero.yaml" --factors 0,0.5,0.8,1,1.2,1.5 --windows 8 --window 64 --plot "$work/sweep.png"

tell "Done. The patched checkpoint with its record (swsurgery.json) and the figures are in $work."
