#!/usr/bin/env bash
# Train and evaluate all rows of one of the paper's tables, one after the other.  NOT RUN ON GPUS.
#
#   PROMPTS=... bash examples/paper/run_table.sh 1 --out runs/paper --benchmark-data benchmark_data [--seeds 1 2 3]
#   bash examples/paper/run_table.sh 1 --out runs/smoke --smoke
#
# --help lists all flags; those after -- are the trainer's.  The same command again goes on: finished rows are skipped,
# a row that was ended resumes.  PROMPTS and other variables are in common.sh.
set -euo pipefail
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
PYTHON="${PYTHON:-${REPO}/.venv/bin/python}"
export PYTHON
exec "${PYTHON}" "${REPO}/tools/paper_table.py" "$@"
