#!/usr/bin/env bash
# Makes the two environments that TRL lives in: .venv-peers-trl (1.16; tests/peers/run.sh makes the
# same one) and .venv-peers-trl112 (1.12.0, the last release with PPO). One that holds its
# requirements already is left as it is.
#
#   PYTHON, TORCH_INDEX   as in tests/peers/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3.11}"
TORCH="torch==2.13.0"
declare -A REQUIREMENTS=(
  [trl]="trl==1.16.* transformers peft datasets jaxtyping msgspec pytest numpy scipy"
  [trl112]="trl==1.12.0 transformers==5.23.0 peft datasets"
)

for name in trl trl112; do
  venv=".venv-peers-$name" wanted="$TORCH ${REQUIREMENTS[$name]}"
  [[ "$(cat "$venv/requirements" 2>/dev/null)" != "$wanted" ]] || continue
  "$PYTHON" -m venv "$venv"
  "$venv/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
  # shellcheck disable=SC2086  # a list of requirements
  "$venv/bin/pip" install --quiet "$TORCH" ${REQUIREMENTS[$name]}
  echo "$wanted" > "$venv/requirements"
done
