#!/usr/bin/env bash
# Installs what the project needs, then lint, types and tests. Arguments go to pytest: bash scripts/test.sh -k gate
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh --dev
bin=${WINNOW_VENV:-.venv}/bin
pytest=("$bin/python" -X faulthandler -m pytest)  # one ended in a segmentation fault after all had passed (2026-11-30)
"$bin/ruff" check .
"$bin/ruff" format --check .
if [ $# -gt 0 ]; then
  "$bin/mypy"
  exec "${pytest[@]}" "$@"
fi

# All of it, in two halves that take about as long: types, tests that train in one process, a cluster of several nodes,
# and jobs, beside the rest, each with one thread a process, for two would wait for each other. Then the quickstart, and
# with the machine to itself what asks how soon its endpoint answers.
beside_the_rest=(tests/trainables tests/test_cluster.py tests/test_jobs.py)
endpoint=(tests/test_quickstart.py tests/test_rollout.py)
elsewhere=("${beside_the_rest[@]}" "${endpoint[@]}")
said=$(mktemp)
set -m  # a group of its own: all of it ends with us
(export OMP_NUM_THREADS=1; "$bin/mypy" && "${pytest[@]}" "${beside_the_rest[@]}") >"$said" 2>&1 &
beside=$!
set +m
trap 'exit 130' INT TERM
trap '{ kill -INT -- "-$beside" 2>/dev/null && wait "$beside"; } || true; rm -f "$said"' EXIT
status=0
OMP_NUM_THREADS=1 "${pytest[@]}" "${elsewhere[@]/#/--ignore=}" || status=$?
wait "$beside" || status=$?
trap 'rm -f "$said"' EXIT
cat "$said"
"${pytest[@]}" "${endpoint[@]}" || status=$?
exit "$status"
