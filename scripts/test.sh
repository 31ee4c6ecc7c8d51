#!/usr/bin/env bash
# Installs what the project needs, then lint, types and tests. Arguments go to pytest: bash scripts/test.sh -k gate
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh --dev
bin=${WINNOW_VENV:-.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest "$@"
