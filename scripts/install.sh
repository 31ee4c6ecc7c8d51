#!/usr/bin/env bash
# Makes .venv where there is none and installs the pinned requirements into it; does nothing when they are there.
#   bash scripts/install.sh [--dev] [--gpu] [--lm-eval]
# --lm-eval adds lm-evaluation-harness, for suites of that kind; --dev has it too, for its tests.
# Another environment: WINNOW_VENV=DIR. The interpreter: WINNOW_PYTHON (default python3.11).
set -euo pipefail
cd "$(dirname "$0")/.."

platform=cpu dev='' lm_eval=''
for argument in "$@"; do
  case $argument in
    --dev) dev=1 lm_eval=1 ;;
    --lm-eval) lm_eval=1 ;;
    --gpu) platform=gpu ;;
    *) echo "install: unknown argument '$argument'; takes --dev, --gpu and --lm-eval" >&2; exit 2 ;;
  esac
done

venv=${WINNOW_VENV:-.venv}
lists=("requirements/$platform.txt" ${lm_eval:+requirements/lm-eval.txt} ${dev:+requirements/dev.txt})
stamp="$venv/.winnow"  # of what is there: more than what is wanted now, perhaps
if [ -f "$stamp" ] && ! grep -qvxFf "$stamp" <(sha256sum "${lists[@]}"); then exit 0; fi

if [ ! -x "$venv/bin/python" ]; then
  python=${WINNOW_PYTHON:-$(command -v python3.11 || command -v python3.12 || command -v python3 || true)}
  if ! "${python:-false}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    echo "install: needs Python 3.11 or 3.12, but found '${python:-none}'; install one or set WINNOW_PYTHON" >&2; exit 2
  fi
  echo "install: making $venv with $python" >&2
  "$python" -m venv "$venv"
fi

rm -f "$stamp"  # until all of this is there
total=$(cat "${lists[@]}" | grep -c '==')
echo "install: ${lists[*]}, $total packages (a few minutes the first time)" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
arguments=()
for list in "${lists[@]}"; do arguments+=(-r "$list"); done

progress() {  # pip's own words, thinned out
  local found=0 line
  while IFS= read -r line; do
    case $line in
      Collecting*|Processing*|Requirement*) found=$((found + 1)); [ $((found % 40)) -ne 0 ] || echo "install: $found of $total found" ;;
      "Installing collected"*) echo "install: all found; unpacking" ;;
    esac
  done
}
pip=("$venv/bin/python" -m pip install --no-compile --disable-pip-version-check --no-deps --progress-bar off)
if ! "${pip[@]}" "${arguments[@]}" 2>&1 | tee "$log" | progress >&2; then
  if grep -q 'torch==.*+cpu' "$log"; then
    echo "install: pip finds no CPU build of $(grep '^torch==' requirements/cpu.txt); set PIP_EXTRA_INDEX_URL to PyTorch's" \
      "CPU wheel index (pytorch.org, 'Get started', compute platform CPU) or PIP_FIND_LINKS to a folder with the wheel" >&2
  else
    tail -n 5 "$log" >&2
    echo "install: pip failed; mend what it says above and run this again" >&2
  fi
  exit 1
fi
# On all cores, where pip would on one, and without packages' own tests; like pip, past files that do not compile.
echo "install: compiling" >&2
"$venv/bin/python" -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' "$venv/lib" >/dev/null 2>&1 || true
sha256sum "${lists[@]}" >"$stamp"
