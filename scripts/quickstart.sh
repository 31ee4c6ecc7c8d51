#!/usr/bin/env bash
# From nothing to a served model on a laptop CPU: installs, makes a tiny base and its data, runs a sweep, deploys the
# winner, asks it, and stops everything it started. No account, no network but the package index.
#   bash scripts/quickstart.sh [--keep]      --keep leaves the endpoint up and prints the curl line
set -euo pipefail
cd "$(dirname "$0")/.."

keep=
case ${1:-} in
  --keep) keep=1 ;;
  "") ;;
  *) echo "quickstart: unknown argument '$1'; takes --keep" >&2; exit 2 ;;
esac

export WINNOW_HOME=${WINNOW_HOME:-$PWD/.winnow}
say() { printf '\n== %s\n' "$*" >&2; }

say "1/5 install"
bash scripts/install.sh
python=${WINNOW_VENV:-.venv}/bin/python

say "2/5 tiny base and ticket data"
if [ -f "$WINNOW_HOME/bases/tiny/config.json" ]; then
  echo "bases/tiny is there already" >&2
else
  "$python" scripts/make_tiny_base.py --out "$WINNOW_HOME/bases/tiny" >&2
fi
if [ -f "$WINNOW_HOME/sources/tickets/general-test.jsonl" ]; then
  echo "sources/tickets is there already" >&2
else
  "$python" scripts/make_ticket_data.py --out "$WINNOW_HOME/sources/tickets" >&2
fi

say "3/5 sweep: search, gate, merge, register"
if "$python" -m serving models --json 2>/dev/null | grep -q '"tickets": {[^}]*"production"'; then
  echo "a production model is registered already; a new sweep: python -m sweeps run sweeps/definitions/quickstart.yaml" >&2
else
  "$python" -m sweeps run sweeps/definitions/quickstart.yaml
fi

pages() {  # what a person reads: the data, and the newest run of it
  local report hash
  report=$(find "$WINNOW_HOME/runs" -path '*/tickets-*/report.html' | sort | tail -n 1)
  hash=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["dataset_hash"])' "${report%report.html}result.json")
  say "to read in a browser:"
  echo "data: $WINNOW_HOME/datasets/$hash.html" >&2
  echo "report: $report" >&2
}

say "4/5 deploy with Ray Serve and vLLM"
port=${WINNOW_PORT:-8000}
stop() { [ -n "$keep" ] || "$python" -m serving stop; }
trap stop EXIT
"$python" -m serving deploy tickets --port "$port"

say "5/5 ask the served model over HTTP"
"$python" scripts/ask_tickets.py --url "http://127.0.0.1:$port/v1"

pages
if [ -n "$keep" ]; then
  say "the endpoint stays up; ask it, and stop it:"
  cat >&2 <<END
curl -s http://127.0.0.1:$port/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "tickets", "messages": [{"role": "user", "content": "Ticket: Hello, My card shows two payments for one Pixel Printer. This is urgent. Thanks, Ada"}], "temperature": 0}'
$python -m serving stop
END
else
  say "done; stopping what was started"
fi
