#!/usr/bin/env bash
# Trains the same tiny task with Amenable and with TRL, five seeds each, and prints a table of
# reward at equal KL. TRL lives in environments of its own (trl_environments.sh): 1.16 for GRPO, RLOO
# and DPO, 1.12 for PPO.
#
#   OUT=runs/parity  where runs go; one that is there already is not made again
#   SEEDS="0 1 2 3 4"  ALGORITHMS="ppo grpo rloo dpo"
#   CORE=0           the core that all of it runs on
#   PYTHON, TORCH_INDEX   as in tests/peers/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

mkdir -p "${OUT:=runs/parity}"
OUT="$(cd "$OUT" && pwd)"
SEEDS="${SEEDS:-0 1 2 3 4}"
ALGORITHMS="${ALGORITHMS:-ppo grpo rloo dpo}"

one_core() { # the command, on one core where that can be asked for
  if command -v taskset >/dev/null; then taskset -c "${CORE:-0}" "$@"; else "$@"; fi
}

PYTHON="${PYTHON:-python3.11}" bash benchmarks/trl_environments.sh
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export HF_DATASETS_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS=ignore
export AMENABLE_HOME="${AMENABLE_HOME:-$OUT/cache}"
HERE=benchmarks/parity

[[ -f "$OUT/task/task.json" ]] || one_core .venv/bin/python "$HERE/task.py" "$OUT/task"
for algorithm in $ALGORITHMS; do
  peer=".venv-peers-trl/bin/python $HERE/trl_new.py"
  [[ "$algorithm" != ppo ]] || peer=".venv-peers-trl112/bin/python $HERE/trl_ppo.py"
  # shellcheck disable=SC2086  # commands and lists of words
  for side in ".venv/bin/python $HERE/ours.py" "$peer"; do
    one_core $side "$OUT/task" "$OUT" --algorithm "$algorithm" --seeds $SEEDS \
      2>> "$OUT/log.txt" | { grep --line-buffered '^{"algorithm"' || true; } \
      | tee -a "$OUT/runs.jsonl"
  done
done
one_core .venv/bin/python "$HERE/measure.py" "$OUT/task" "$OUT" 2>> "$OUT/log.txt"
.venv/bin/python "$HERE/table.py" "$OUT" | tee "$OUT/table.md"
