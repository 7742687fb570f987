"""How long `amenable --help` takes: best and median of 20 runs, beside Python's own start.

    .venv/bin/python benchmarks/startup.py

The target is 0.3 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 20
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import typer": ["-c", "import typer"],
    "amenable --help": ["-m", "amenable", "--help"],
    "amenable run --help": ["-m", "amenable", "run", "--help"],
    "amenable run --keys": ["-m", "amenable", "run", "--keys"],
}


def seconds(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    print(f"{'command':<22}{'best, s':>10}{'median, s':>11}")
    for name, words in COMMANDS.items():
        times = [seconds(words) for _ in range(RUNS)]
        print(f"{name:<22}{min(times):>10.3f}{statistics.median(times):>11.3f}")


if __name__ == "__main__":
    main()
