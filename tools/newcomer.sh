#!/usr/bin/env bash
# Times a newcomer's path in a fresh clone: set up and run the demonstration, then look at its report in a browser.
# On a machine that has other work, the processor's seconds tell more than the clock's.
set -euo pipefail

here=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT

timed() {
    local TIMEFORMAT="== $1: %R s (processor: %U s) =="
    shift
    time "$@"
}

look() {
    chromium --headless --no-sandbox --disable-gpu --dump-dom "file://$(ls "$PWD"/runs/*/report.html)" 2> /dev/null > page
    grep --quiet 'accuracy after' page
}

git clone --quiet "$here" "$clone"
cd "$clone"
export OMP_WAIT_POLICY=passive
SECONDS=0
timed 'installation' make .venv/installed
timed 'make demo' make demo
timed 'the report in a browser' look
echo "== all of it: $SECONDS s (aim: less than 300) =="
