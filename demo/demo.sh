#!/usr/bin/env bash
# Run every step on a real model and explain it. usage: demo.sh MODEL_DIRECTORY
set -euo pipefail
model=$1
work=build/demo
rm -rf "$work"
mkdir -p "$work"
export XDG_DATA_HOME="$PWD/$work/data" # the entry that scan --register writes stays in the demo's folder

bold='' blue='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
  bold=$'\033[1m' blue=$'\033[36m' plain=$'\033[0m'
fi
tell() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
run() {
  printf '%s$' "$blue"
  for word; do # quote words that contain spaces
    case $word in *" "*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
  done
  printf '%s\n' "$plain"
  "$@"
}

tell "1. Find the super weights of SmolLM2-135M-Instruct: 135 million parameters in five shards.
   A few prompts are run, and scalars that cause a persistent massive activation are candidates. Each candidate is
   then zeroed, alone and together with the others, and compared with random scalars of similar size and with other
   large rows of the same columns. A verdict needs at least eight windows of text (two to three minutes on two cores)."
run swsurgery scan "$model" --confirm --windows 8 --window 64 \
  --manifest "$work/zero.yaml" --plot "$work/scan.png" --register smollm2-135m-instruct-demo

tell "2. Find them in the weights alone, without running the model. Both methods find the same neurons."
run swsurgery scan "$model" --method weights

tell "3. Look up the result. lookup also knows what was published about 75 other models."
run swsurgery lookup smollm2-135m-instruct-demo

tell "4. Read the manifest that scan wrote, and print the edits that it would make. Nothing is changed yet."
run cat "$work/zero.yaml"
run swsurgery apply "$work/zero.yaml" --dry-run

tell "5. Read one super weight: its value, its bits and their position in the file.
   Besides this value, only headers are read."
read -r tensor at < <(swsurgery apply "$work/zero.yaml" --dry-run --json --quiet | python -c '
import json, sys
splice = json.load(sys.stdin)["splices"][0]
print(splice["tensor"], ",".join(map(str, splice["index"])))')
run swsurgery inspect "$model" --tensor "$tensor" --at "$at"

tell "6. Apply the manifest: a few bytes change, and the model is run with and without the change (under a minute)."
run swsurgery apply "$work/zero.yaml" -o "$work/patched" --windows 8 --window 128

tell "7. Repeat the comparison with your own prompt."
run swsurgery check "$work/patched" --windows 8 --window 128 --prompt "The largest planet of the solar system is"

tell "8. Prove the edit without the base: with the old bytes put back, every file has the base's sha256."
run swsurgery verify "$work/patched"

tell "9. List the scalars that differ. (The exit code is 1 if any scalar differs.)"
run swsurgery diff "$model" "$work/patched" || test $? -eq 1

tell "10. Restore the base, byte for byte."
run swsurgery revert "$work/patched" -o "$work/reverted"
run diff -r "$model" "$work/reverted"

tell "11. Measure the quality with the super weights multiplied by each factor."
run swsurgery sweep "$work/zero.yaml" --factors 0,0.5,0.8,1,1.2,1.5 --windows 8 --window 64 --plot "$work/sweep.png"

tell "Done. The patched checkpoint with its record (swsurgery.json), and the figures, are in $work."
