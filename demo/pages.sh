#!/usr/bin/env bash
# Write the HTML page of every command for a real model. usage: pages.sh MODEL_DIRECTORY
set -euo pipefail
model=$1
work=build/pages
rm -rf "$work"
mkdir -p "$work"
export XDG_DATA_HOME="$PWD/$work/data" # the entry that scan --register writes stays in this folder

text=(--windows 8 --window 64)
run() {
  printf '$ swsurgery %s\n' "$*"
  swsurgery "$@" --quiet >"$work/output.txt"
}

run scan "$model" --confirm "${text[@]}" --manifest "$work/zero.yaml" --register smollm2-demo --page "$work/scan.html"
run scan "$model" --method weights --page "$work/scan-weights.html"
run lookup smollm2-demo --page "$work/lookup.html"
run lookup --page "$work/lookup-all.html"
run apply "$work/zero.yaml" --dry-run --page "$work/plan.html"
run apply "$work/zero.yaml" -o "$work/patched" "${text[@]}" --page "$work/apply.html"
run check "$work/patched" "${text[@]}" --page "$work/check.html"
run verify "$work/patched" --known --model smollm2-demo --page "$work/verify.html"
run sweep "$work/zero.yaml" --factors 0,0.5,0.8,1,1.5 "${text[@]}" --page "$work/sweep.html"
run compare "$work/zero.yaml" "${text[@]}" --page "$work/compare.html"
printf 'pages: %s\n' "$work"/*.html
