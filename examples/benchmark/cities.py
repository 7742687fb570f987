"""Writes a benchmark of world knowledge: in which country is a city, one of four answers.

    python examples/benchmark/cities.py my_tasks
    amenable benchmark runs/demo --tasks my_tasks/cities.yaml

Cities and countries are those of the time zone database (public domain) that Python or the system
has; the wrong answers are other countries of the same part of the world, drawn by a fixed seed.
"""

from __future__ import annotations

import json
import random
import sys
import zoneinfo
from collections.abc import Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

TASK = """\
task: cities
dataset_path: json
dataset_kwargs:
  data_files:
    test: cities.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def table(name: str) -> list[list[str]]:
    places = [Path(path) for path in zoneinfo.TZPATH]
    with suppress(ModuleNotFoundError):  # else the system's own
        places.insert(0, Path(str(files("tzdata") / "zoneinfo")))
    for place in places:
        if (place / name).is_file():
            lines = (place / name).read_text(encoding="utf-8").splitlines()
            return [line.split("\t") for line in lines if not line.startswith("#")]
    sys.exit(f"{name}: no time zone database here; pip install tzdata")


def questions() -> Iterator[dict[str, object]]:
    names = {code: name for code, name, *_ in table("iso3166.tab")}
    places = [
        (zone.split("/")[0], zone.split("/")[1].replace("_", " "), names[code])
        for code, _, zone, *_ in table("zone.tab")
        if zone.count("/") == 1 and code != "AQ"
    ]
    for part, city, country in sorted(places):
        others = sorted({c for p, _, c in places if p == part} - {country})
        told = city.split()[0] in country or country.split()[0] in city
        if told or len(others) < 3:
            continue
        draw = random.Random(city)
        choices = [country, *draw.sample(others, 3)]
        draw.shuffle(choices)
        question = f"In which country or territory is {city}?"
        yield {"question": question, "choices": choices, "answer": choices.index(country)}


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(questions())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "cities.jsonl").write_text(text, encoding="utf-8")
    (folder / "cities.yaml").write_text(TASK, encoding="utf-8")
    print(f"{folder / 'cities.yaml'}: {len(rows)} questions")
