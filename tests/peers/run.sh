#!/usr/bin/env bash
# Compares our losses with other libraries', gives them the files that we write and runs the harness
# of `amenable benchmark`, each in a virtual environment of its own.
# PYTHON names the interpreter (3.11 to 3.13), TORCH_INDEX the index that torch comes from.
# With arguments, runs only the named peers: tests/peers/run.sh trl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON="${PYTHON:-python3.11}"
TORCH="torch==2.13.0"
declare -A REQUIREMENTS=(
  [trl]="trl==1.16.* transformers peft datasets jaxtyping msgspec pytest numpy scipy"
  [lm_eval]="lm-eval[hf]==0.4.13 transformers peft datasets scipy typer rich msgspec filelock fsspec pyarrow safetensors tomli-w jaxtyping pytest"
  [torchtune]="torchtune==0.6.1 torchao==0.9.0 jaxtyping pytest"
)

prepare() { # peer: makes .venv-peers-PEER unless it already holds these requirements
  local venv=".venv-peers-$1" wanted="$TORCH ${REQUIREMENTS[$1]}"
  [[ "$(cat "$venv/requirements" 2>/dev/null)" == "$wanted" ]] && return
  "$PYTHON" -m venv "$venv"
  "$venv/bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
  # shellcheck disable=SC2086  # a list of requirements
  "$venv/bin/pip" install --quiet "$TORCH" ${REQUIREMENTS[$1]}
  echo "$wanted" > "$venv/requirements"
}

export PYTHONPATH=src HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
[[ $# -gt 0 ]] || set -- trl torchtune lm_eval
status=0
for peer in "$@"; do
  prepare "$peer"
  ".venv-peers-$peer/bin/python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider \
    -W ignore -q -s "tests/peers/test_$peer"*.py || status=1
done
exit "$status"
