"""Speed and memory of the check of content and of the statistics, on synthetic preference rows.

    python benchmarks/content.py [rows]            # default 200,000

The rows are made as they are asked for, words drawn from a Zipf-like vocabulary with a fixed seed:
a prompt of about 60 words, two pairs a prompt, two candidates of about 40 words, one of 50
annotators. Measured is one call of `content_report` or of `data_statistics`, each in a process of
its own.

- seconds: of the processor, less those that making the rows takes alone;
- growth: peak resident memory above that before the call, libraries loaded by it included;
- a million rows: what the columns cost, the growth from half of the rows to all of them with a
  sample of 1,000 prompts for near duplicates in place of 20,000. The sample comes on top; it is
  full from 40,000 different prompts on and grows no more.

Measured once with 100,000 rows, on one shared core of an Intel Xeon, Python 3.11: content 11,700
rows/s and 80 MiB (12,800 rows/s with the small sample: what every further row costs), 125 MiB a
million rows; statistics 27,000 to 47,000 rows/s, 147 MiB a million rows.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from amenable.data.content.report import SAMPLE, content_report
from amenable.data.content.statistics import Part, data_statistics
from amenable.data.schemas import Choice, Message, Preference, Prompt, Speaker

ROWS = 200_000
VOCABULARY = 50_000


def synthetic_rows(rows: int, seed: int = 0) -> Iterator[tuple[str, Preference]]:
    rng = np.random.default_rng(seed)
    names = np.array([f"w{number:x}" for number in range(VOCABULARY)])
    weights = 1 / np.arange(1, VOCABULARY + 1)
    cumulated = np.cumsum(weights / weights.sum())

    def text(words: int) -> str:
        return " ".join(names[np.searchsorted(cumulated, rng.random(words))])

    asked = ""
    for number in range(rows):
        if number % 2 == 0:
            asked = text(int(rng.integers(30, 90)))
        yield (
            f"pairs.jsonl:{number + 1}",
            Preference(
                prompt=Prompt(
                    messages=(Message(Speaker.USER, asked),), id=f"pairs:{number}", group=asked
                ),
                candidate_0=text(int(rng.integers(20, 60))),
                candidate_1=text(int(rng.integers(20, 60))),
                choice=Choice(int(rng.integers(2))),
                annotator=f"annotator {rng.integers(50)}",
            ),
        )


def measure(what: str, rows: int, sample: int) -> tuple[float, int]:
    """Processor seconds less those of making the rows, and growth of peak memory in bytes."""
    parts: dict[str, Part] = {"preferences": lambda: synthetic_rows(rows)}
    started = time.process_time()
    for _ in synthetic_rows(rows):
        pass
    making = time.process_time() - started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    if what == "content":
        content_report(parts, sample=sample)
    else:
        data_statistics(parts)
    seconds = time.process_time() - started - making
    return seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_own_process(what: str, rows: int, sample: int = SAMPLE) -> tuple[float, int]:
    command = [sys.executable, str(Path(__file__)), what, str(rows), str(sample)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, growth = printed.split()
    return float(seconds), int(growth)


def main() -> None:
    if len(sys.argv) == 4:
        print(*measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    print(f"{'':12}{'rows':>10}{'seconds':>10}{'rows/s':>10}{'growth':>12}{'a million rows':>18}")
    for what in ("content", "statistics"):
        seconds, growth = in_own_process(what, rows)
        few, many = (in_own_process(what, n, 1000)[1] for n in (rows // 2, rows))
        each = (many - few) / (rows - rows // 2)
        print(
            f"{what:12}{rows:10,}{seconds:10.1f}{rows / seconds:10,.0f}"
            f"{growth / 2**20:8.0f} MiB{each * 1e6 / 2**20:14.0f} MiB"
        )


if __name__ == "__main__":
    main()
