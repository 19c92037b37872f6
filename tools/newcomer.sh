#!/usr/bin/env bash
# Times a newcomer's path in a fresh clone: set up and run the demonstration, then look at its report in a browser.
set -euo pipefail

here=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git clone --quiet "$here" "$clone"
cd "$clone"
export OMP_WAIT_POLICY=passive

SECONDS=0
make .venv/installed
printf '\n== installed: %d s ==\n' "$SECONDS"
make demo
printf '\n== make demo: %d s ==\n' "$SECONDS"
page=$(chromium --headless --no-sandbox --disable-gpu --dump-dom "file://$(ls "$PWD"/runs/*/report.html)" 2> chromium.log)
grep --quiet 'accuracy after' <<< "$page"
printf '== a report in the browser: %d s (aim: less than 300) ==\n' "$SECONDS"
