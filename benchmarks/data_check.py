"""How fast `amenable data check` reads a million preference rows, and what it finds.

    .venv/bin/python benchmarks/data_check.py                  # 1,000,000 rows of about 1 kB
    .venv/bin/python benchmarks/data_check.py --rows 100000 --json

Writes two files of the same seeded rows, one of them with 50 planted faults of 36 kinds, and reads
both with the check, with the training reader (faulty rows left out) and with
`datasets.load_dataset("json")`, each in a fresh process on one core; then a tenth of the rows in
every other format that can be written. Peak memory is VmHWM. The files are in the page cache.
Seconds are of the reading; CPU seconds are of the whole process, imports included, and tell more
where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

Json = dict[str, Any]
FAULTS = 50

# A row is in one language, as most are; the numbers are their shares in percent.
LANGUAGES = (
    (55, "the of a summary reward gradient policy answer shorter because however prefer which"),
    (15, "größer Straße café naïve Übung más niño réponse français için değil się więcej mai"),
    (10, "мир ответ слово модель правда лучше короче потому если когда текст нельзя"),
    (10, "猫 回答 模型 人間 比較 好み 要約 文章 世界 言葉 正しい 短い"),
    (5, "σωστό λόγος שלום מילה उत्तर शब्द كلمة جواب คำตอบ"),
    (5, "well 🙂 👩‍🔬 thanks — see “this” ½ € done"),
)
ESCAPED = ("\n", "\n\n", "\t", '"quoted"', "back\\slash", "C:\\temp", "a/b")


# Rows ---------------------------------------------------------------------------------------------


def sentences(words: list[str], draw: random.Random) -> list[str]:
    """1,000 sentences of about 130 bytes."""
    told = []
    for _ in range(1000):
        taken: list[str] = []
        while len(" ".join(taken).encode()) < 100 + draw.randint(0, 50):
            taken.append(draw.choice(words if draw.random() < 0.95 else ESCAPED))
        told.append(" ".join(taken))
    return told


def rows(count: int, seed: int) -> Iterator[bytes]:
    """Preference rows of about 1 kB, most of them with an id, some with the optional keys."""
    draw = random.Random(seed)
    pools = [sentences(words.split(), draw) for _, words in LANGUAGES]
    shares = [share for share, _ in LANGUAGES]
    for number in range(count):
        pool = draw.choices(pools, shares)[0]
        row: Json = {
            "input_text": f"{number}: {' '.join(draw.choices(pool, k=4))}",
            "candidate_0": f"{' '.join(draw.choices(pool, k=2))} 0",
            "candidate_1": f"{' '.join(draw.choices(pool, k=2))} 1",
            "choice": draw.choice((0, 1, 1, 0, "tie")),
        }
        kind = number % 10
        if kind < 7:
            row["id"] = f"row-{number}"
        if kind < 2:
            row |= {"weight": draw.random() + 0.1, "annotator": f"annotator-{draw.randint(0, 99)}"}
        if kind == 2:
            row |= {"margin": 1, "group": f"document-{number // 7}", "source": {"page": number}}
        if kind == 3:  # as writers that escape everything but ASCII do
            yield json.dumps(row).encode()
        else:
            yield msgspec.json.encode(row)


# Faults -------------------------------------------------------------------------------------------


def with_key(key: str, value: object) -> Callable[[Json], bytes]:
    return lambda row: json.dumps({**row, key: value}).encode()


def without(key: str) -> Callable[[Json], bytes]:
    return lambda row: json.dumps({k: v for k, v in row.items() if k != key}).encode()


def chat(*speakers: str) -> list[Json]:
    return [{"role": speaker, "content": "Words."} for speaker in speakers]


FAULT_KINDS: dict[str, Callable[[Json], bytes]] = {
    "no closing brace": lambda row: json.dumps(row).encode()[:-1],
    "half a line": lambda row: json.dumps(row).encode()[:300],
    "NaN": lambda row: json.dumps({**row, "margin": float("nan")}).encode(),
    "infinity": lambda row: json.dumps({**row, "weight": float("inf")}).encode(),
    "not UTF-8": lambda row: (
        json.dumps(row).encode().replace(b'"choice"', b'"x": "\xe9", "choice"')
    ),
    "a line of 10 MB": with_key("input_text", "x" * 10_000_000),
    "nested 500 deep": lambda row: (
        json.dumps(row).encode()[:-1] + b', "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    ),
    "half a surrogate pair": lambda row: json.dumps({**row, "candidate_0": "\ud800"}).encode(),
    "control character": lambda row: (
        json.dumps(row).encode().replace(b"input_text", b"input\x01text")
    ),
    "single quotes": lambda row: repr({"input_text": "a", "choice": 0}).encode(),
    "a list": lambda row: json.dumps(list(row.values())).encode(),
    "a text": lambda row: b'"row"',
    "two objects in a line": lambda row: json.dumps(row).encode() * 2,
    "choice as text": with_key("choice", "0"),
    "choice true": with_key("choice", True),
    "choice 2": with_key("choice", 2),
    "choice 1.0": with_key("choice", 1.0),
    "no choice": without("choice"),
    "no candidate": without("candidate_1"),
    "equal candidates": lambda row: json.dumps({**row, "candidate_0": row["candidate_1"]}).encode(),
    "empty candidate": with_key("candidate_0", ""),
    "blank input": with_key("input_text", " \n\t"),
    "input is a number": with_key("input_text", 7),
    "candidate is a list": with_key("candidate_1", ["a"]),
    "weight 0": with_key("weight", 0),
    "weight as text": with_key("weight", "1"),
    "margin below 0": with_key("margin", -1),
    "empty id": with_key("id", ""),
    "annotator is an object": with_key("annotator", {}),
    "strength against choice": lambda row: json.dumps({**row, "choice": 0, "strength": 9}).encode(),
    "context without messages": with_key("context", "Be brief."),
    "messages and input_text": with_key("messages", chat("user")),
    "messages end with the assistant": lambda row: without("input_text")(
        {**row, "messages": chat("user", "assistant")}
    ),
    "another format": lambda row: json.dumps(
        {"prompt": row["input_text"], "chosen": row["candidate_0"], "rejected": row["candidate_1"]}
    ).encode(),
    "id used twice": with_key("id", "row-0"),
}


def write_files(folder: Path, count: int, seed: int) -> tuple[Path, Path, dict[int, str]]:
    """The file without faults, the file with faults, and line -> kind of the planted faults."""
    draw = random.Random(seed)
    kinds = [list(FAULT_KINDS)[number % len(FAULT_KINDS)] for number in range(FAULTS - 1)]
    lines = draw.sample(range(2, count), len(kinds))
    planted = dict(zip(lines, kinds, strict=True))
    good, bad = folder / "good.jsonl", folder / "bad.jsonl"
    with good.open("wb") as whole, bad.open("wb") as faulty:
        for line, row in enumerate(rows(count, seed), 1):
            whole.write(row + b"\n")
            if line == count:
                faulty.write(row[:-100])  # a copy that was broken off
            elif line in planted:
                faulty.write(FAULT_KINDS[planted[line]](msgspec.json.decode(row)) + b"\n")
            else:
                faulty.write(row + b"\n")
    return good, bad, {**planted, count: "half-written last line"}


def write_formats(folder: Path, good: Path, count: int) -> dict[str, Path]:
    """The first rows, less ties, in every other format that can be written."""
    from itertools import islice

    from amenable.data.formats.table import FORMATS
    from amenable.data.reading.readers import iter_preferences
    from amenable.data.reading.records import ReadLog
    from amenable.data.schemas import Choice

    paths = {}
    for name, form in FORMATS.items():
        if form.write_preference is None or name == "native":
            continue
        paths[name] = folder / f"{name}.jsonl"
        with paths[name].open("wb") as file:
            for _, item in islice(iter_preferences([good], ReadLog()), count):
                if item.choice is Choice.TIE:
                    continue  # most formats have none
                if form.refuses is None or not form.refuses(item):
                    for row in form.write_preference(item):
                        file.write(msgspec.json.encode(row) + b"\n")
    return paths


# What is measured, each in a process of its own ---------------------------------------------------


def run_check(path: str, _: str) -> Json:
    from amenable.data.reading.check import check_files

    report = check_files([path], max_errors=0)
    heavy = {"torch", "transformers", "pyarrow", "datasets"} & set(sys.modules)
    assert not heavy, heavy
    lines = [fault.line for fault in report.faults]
    return {"rows": report.rows, "lines": lines, "reasons": len(report.reasons)}


def run_predicate_off(path: str, _: str) -> Json:
    """The check with the full reader for every row: what the short way for plain rows saves."""
    from amenable.data.reading import check

    check.PLAIN = dict.fromkeys(check.PLAIN, lambda values: False)  # type: ignore[arg-type]
    return run_check(path, _)


def run_fix(path: str, folder: str) -> Json:
    from amenable.data.reading.check import check_files

    report = check_files([path], max_errors=0, fix=Path(folder) / "fixed.jsonl")
    assert report.fixed is not None
    return {"rows": report.fixed.rows, "lines": [fault.line for fault in report.faults]}


def run_train(path: str, _: str) -> Json:
    from amenable.data.reading.readers import iter_preferences
    from amenable.data.reading.records import DroppingLog

    lines: list[int | None] = []

    class Log(DroppingLog):
        def fault(self, error: Any, raw: object = None) -> None:
            lines.append(error.line)
            super().fault(error, raw)

    count = sum(1 for _ in iter_preferences([path], Log()))
    return {"rows": count, "lines": lines}


def run_datasets(path: str, cache: str) -> Json:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    except Exception as error:
        cause = error.__cause__ or error
        told = f"{type(error).__name__} from {type(cause).__name__}: {str(cause).splitlines()[0]}"
        return {"rows": 0, "lines": [], "error": told[:200]}
    return {"rows": len(loaded), "lines": []}


RUNS: dict[str, Callable[[str, str], Json]] = {
    "check": run_check,
    "full": run_predicate_off,
    "fix": run_fix,
    "train": run_train,
    "datasets": run_datasets,
}


def child(what: str, path: str, folder: str) -> None:
    start = time.perf_counter()
    result = RUNS[what](path, folder)
    result["seconds"] = time.perf_counter() - start
    result["cpu_seconds"] = time.process_time()
    status = Path("/proc/self/status").read_text()
    result["rss_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps(result))


def measure(what: str, path: Path, core: int) -> Json:
    words = [sys.executable, str(Path(__file__).resolve()), "--child", what, str(path)]
    if shutil.which("taskset"):
        words = ["taskset", "-c", str(core), *words]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": folder}
        done = subprocess.run(
            [*words, folder], capture_output=True, text=True, env={**os.environ, **quiet}
        )
    if done.returncode:
        return {
            "rows": 0,
            "seconds": float("nan"),
            "rss_mb": float("nan"),
            "lines": [],
            "error": done.stderr.strip().splitlines()[-1],
        }
    return dict(json.loads(done.stdout.splitlines()[-1]))


def figures(what: str, path: Path, planted: dict[int, str], core: int, records: int) -> Json:
    result = measure(what, path, core)
    lines = result.pop("lines")
    megabytes = path.stat().st_size / 1e6
    return {
        "what": what,
        "file": path.name,
        "records_per_s": round(records / result["seconds"]),
        "mb_per_s": round(megabytes / result["seconds"], 1),
        "seconds": round(result.pop("seconds"), 2),
        "cpu_seconds": round(result.pop("cpu_seconds"), 2),
        "rss_mb": round(result.pop("rss_mb"), 1),
        "planted": len(planted),
        "found": len(set(lines) & set(planted)),
        "not_planted": len(lines) - len(set(lines) & set(planted)),
        "missed": sorted({planted[line] for line in set(planted) - set(lines)}),
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="the core that every run is pinned to")
    parser.add_argument("--dir", type=Path, default=None, help="where the files are written")
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        good, bad, planted = write_files(folder, args.rows, args.seed)
        told = []
        for what in args.only:
            for path, faults in ((good, {}), (bad, planted)):
                told.append(figures(what, path, faults, args.core, args.rows))
                show(told[-1], args.json)
        if "check" in args.only:
            count = max(args.rows // 10, 1)
            for path in write_formats(folder, good, count).values():
                records = sum(1 for _ in path.open("rb"))
                told.append(figures("check", path, {}, args.core, records))
                show(told[-1], args.json)
    rates = {(one["what"], one["file"]): one["records_per_s"] for one in told}
    summary: Json = {
        "rows": args.rows,
        "seed": args.seed,
        "fault_kinds": len(set(planted.values())),
        "runs": told,
    }
    if ("datasets", "good.jsonl") in rates and ("check", "good.jsonl") in rates:
        summary["times_datasets"] = round(
            rates["check", "good.jsonl"] / rates["datasets", "good.jsonl"], 2
        )
    if args.json:
        print(json.dumps(summary, indent=2))
    elif "times_datasets" in summary:
        print(f"check / datasets, file without faults: {summary['times_datasets']}")


def show(run: Json, as_json: bool) -> None:
    line = (
        f"{run['what']:<9}{run['file']:<16}{run['records_per_s']:>10,} records/s"
        f"{run['mb_per_s']:>8} MB/s{run['seconds']:>8} s{run['cpu_seconds']:>8} s CPU"
        f"{run['rss_mb']:>8} MB"
        f"  {run['found']}/{run['planted']} found, {run['not_planted']} not planted"
    )
    extra = [f"missed: {', '.join(run['missed'])}"] if run["missed"] else []
    extra += [run["error"]] if "error" in run else []
    print("\n    ".join([line, *extra]), file=sys.stderr if as_json else sys.stdout, flush=True)


if __name__ == "__main__":
    main()
