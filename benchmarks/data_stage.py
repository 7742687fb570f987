"""The data stage on a large file: rows a second and peak memory; and what the token cache saves.

    .venv/bin/python benchmarks/data_stage.py --folder /tmp/bench [--rows 1000000] [--json]

Writes seeded preference rows of about 1 kB as plain .jsonl under the folder (kept for the next
time), runs the stage on them in a fresh process on one core, then tokenizes 20,000 rows with the
tokenizer of the built-in tiny model, or of `--model`, and opens their cache entry again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = 170  # of about 6 bytes, in prompt and candidates together
TOKEN_ROWS = 20_000


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(5000)]

    def text(count: int) -> str:
        start = rng.randrange(len(words) - count)
        return " ".join([rng.choice(words), *words[start : start + count], rng.choice(words)])

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "id": f"row-{number}",
                "input_text": f"{text(WORDS // 2)} {number // 3}",
                "candidate_0": text(WORDS // 4),
                "candidate_1": text(WORDS // 4),
                "choice": rng.choice([0, 1, 1, "tie"]),
            }
            file.write(json.dumps(row) + "\n")


def run_stage(rows: Path, out: Path) -> dict[str, Any]:
    """Runs in the fresh process."""
    from types import SimpleNamespace

    from amenable.artifacts import RunFolder
    from amenable.config.data import DataConfig, PreferenceSource
    from amenable.config.recipe import Recipe
    from amenable.data import row_table, stage

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    recipe = Recipe(data=DataConfig(preferences=PreferenceSource(files=(str(rows),))))
    context: Any = SimpleNamespace(
        recipe=recipe,
        folder=RunFolder(out),
        progress=SimpleNamespace(say=lambda text: None),
        open_renderer=None,  # the look at tokens is timed by itself
    )
    start, cpu = time.perf_counter(), time.process_time()
    section = stage.run(context)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = json.loads((out / "data" / "report.json").read_text("utf-8"))["read"]["preferences"]
    return {
        "rows": count,
        "file_bytes": rows.stat().st_size,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "rows_per_s": round(count / wall),
        "rows_per_cpu_s": round(count / cpu),
        "peak_rss_mb": round(peak * 1024 / 1e6),
        "rss_after_imports_mb": round(before * 1024 / 1e6),
        "table_bytes_per_row_and_id": row_table.ROW_BYTES,
        "rss_bytes_per_row": round((peak - before) * 1024 / count),
        "splits": section["splits"],
    }


def tokens(rows: Path, folder: Path, model: str) -> dict[str, Any]:
    """Seconds to tokenize rows, and to open their entry again. Runs in the fresh process."""
    from amenable.config.model import ModelConfig
    from amenable.config.recipe import Recipe
    from amenable.data.row_file import open_preferences
    from amenable.data.tokens.cache import TokenCache
    from amenable.models.build import Foundation

    foundation = Foundation.open(Recipe(model=ModelConfig(base=model)))
    cache = TokenCache(folder / "tokens", foundation.renderer, lambda text: None)
    shutil.rmtree(cache.folder, ignore_errors=True)
    found = {"model": model}
    for name in ("tokenize_s", "open_s"):
        start = time.perf_counter()
        groups = cache.preferences(open_preferences(rows))
        found[name] = round(time.perf_counter() - start, 3)
    return {**found, "rows": len(groups), "tokens": int(groups.lengths.sum())}


def fresh(*words: str) -> dict[str, Any]:
    """What a process on one core, with one thread, prints."""
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        ["taskset", "-c", core, sys.executable, __file__, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "data_stage")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--within", choices=("stage", "tokens"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    rows, out = options.folder / f"rows-{options.rows}.jsonl", options.folder / "run"
    if options.within == "stage":
        print(json.dumps(run_stage(rows, out)))
        return
    few = options.folder / f"few-{TOKEN_ROWS}.jsonl"
    if options.within == "tokens":
        print(json.dumps(tokens(few, options.folder, options.model)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not rows.exists():
        write_rows(rows, options.rows)
    same = ["--folder", str(options.folder), "--rows", str(options.rows), "--model", options.model]
    found = {"stage": fresh(*same, "--within", "stage")}
    with (out / "data" / "preferences.train.jsonl").open("rb") as file, few.open("wb") as part:
        part.writelines(line for line, _ in zip(file, range(TOKEN_ROWS), strict=False))
    shutil.rmtree(out)
    found["tokens"] = fresh(*same, "--within", "tokens")
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for part_name, figures in found.items():
        print(part_name)
        for name, value in figures.items():
            print(f"  {name:<28}{value}")


if __name__ == "__main__":
    main()
