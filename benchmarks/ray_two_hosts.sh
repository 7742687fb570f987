#!/usr/bin/env bash
# The tiny recipe on a Ray cluster of two hosts: two network namespaces of this machine, each with a
# host name and an address of its own, one core each, so that each must take one of two workers.
# Says how long it took and how far the result is from that of one process.
#
#   make test-ray && sudo benchmarks/ray_two_hosts.sh      docs/ray.md quotes it
#
# Needs root and iproute2. What it makes (namespaces, their /etc/netns, processes, a folder) goes
# when it ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export PYTHONPATH="${PYTHONPATH:-$PWD/.venv-ray:$PWD/src}" OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0
hosts=(amenable-head amenable-other)
addresses=(10.77.0.1 10.77.0.2)
work=$(mktemp -d)
nodes=()
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token # for all of this cluster, and no other

clean() {
	for node in "${nodes[@]}"; do kill "$node" 2>/dev/null && wait "$node" || true; done
	for host in "${hosts[@]}"; do
		ip netns delete "$host" 2>/dev/null || true
		rm -rf "/etc/netns/$host"
	done
	rm -rf "$work"
}
trap clean EXIT
trap 'exit 1' INT TERM

on() { # HOST COMMAND...: with the host's network, and under its name
	local host=$1
	shift
	exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
}

(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
for n in 0 1; do
	ip netns add "${hosts[n]}"
	mkdir -p "/etc/netns/${hosts[n]}"
	printf '127.0.0.1 localhost\n%s %s\n%s %s\n' \
		"${addresses[0]}" "${hosts[0]}" "${addresses[1]}" "${hosts[1]}" >"/etc/netns/${hosts[n]}/hosts"
done
ip link add amenable0 netns "${hosts[0]}" type veth peer name amenable0 netns "${hosts[1]}"
for n in 0 1; do
	ip -n "${hosts[n]}" address add "${addresses[n]}/24" dev amenable0
	ip -n "${hosts[n]}" link set amenable0 up
	ip -n "${hosts[n]}" link set lo up
done

node() { # HOST ADDRESS OPTION...
	on "$1" "$python" -c 'from ray.scripts.scripts import main; main()' start --block \
		--node-ip-address "$2" --num-cpus 1 --object-store-memory 100000000 --disable-usage-stats \
		"${@:3}" >"$work/$1.log" 2>&1
}
node "${hosts[0]}" "${addresses[0]}" --head --port 6379 --include-dashboard false &
nodes+=($!)
joined() { (on "${hosts[0]}" "$python" -c "
import logging, ray
ray.init('${addresses[0]}:6379', log_to_driver=False, logging_level=logging.FATAL)
exit(sum(node['Alive'] for node in ray.nodes()) != $1)" >/dev/null 2>&1); }
until joined 1; do kill -0 "${nodes[0]}" || { cat "$work"/*.log && exit 1; }; sleep 1; done
node "${hosts[1]}" "${addresses[1]}" --address "${addresses[0]}:6379" &
nodes+=($!)
until joined 2; do kill -0 "${nodes[1]}" || { cat "$work"/*.log && exit 1; }; sleep 1; done

recipe=(run examples/tiny.toml --set 'model.dtype="fp64"' --set policy.learning_rate=0.01)
"$python" -m amenable "${recipe[@]}" --out "$work/alone" >/dev/null 2>&1
start=$SECONDS
(on "${hosts[0]}" "$python" -m amenable "${recipe[@]}" --set ray.workers=2 \
	--on "ray://${addresses[0]}:6379" --out "$work/run") 2>&1 | tee "$work/said"
echo "two hosts: $((SECONDS - start)) s"
for host in "${hosts[@]}"; do grep -q "^ray: worker . of 2: $host," "$work/said"; done
"$python" - "$work" <<'EOF'
import sys
from pathlib import Path

from safetensors.torch import load_file

one, two = (Path(sys.argv[1]) / name / "models/tuned/model.safetensors" for name in ("alone", "run"))
a, b = load_file(one), load_file(two)
apart = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
print(f"largest difference of a weight from one process's: {apart:.1e}")
sys.exit(apart > 1e-8)
EOF
