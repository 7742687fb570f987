"""Seconds to analyse a judge's verdicts: `python benchmarks/verdicts.py [--prompts 5000] [--json]`.

A comparison of two systems with every figure of `amenable compare` (docs/compare.md): win rates,
intervals, the judge's bias and the slices; then a ranking of three. One core.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from amenable.data.schemas import Message, Prompt, Speaker
from amenable.evaluate.judged import games, judged
from amenable.evaluate.ranking import rank
from amenable.judges.asking import Look, Pair
from amenable.judges.types import Reply, Verdict


def looks(prompts: int, seed: int) -> list[Look]:
    """Both orders of each prompt, with ties, a liking for the first place and for longer texts."""
    draw = random.Random(seed)
    found = []
    for number in range(prompts):
        asked = Prompt(
            messages=(Message(Speaker.USER, "word " * draw.randint(5, 90)),),
            id=str(number),
            group=str(number),
            meta={"tag": f"topic {number % 8}"},
        )
        pair = Pair(asked, "a " * draw.randint(3, 40), "b " * draw.randint(3, 40))
        lean = draw.gauss(0.3, 1) + 0.02 * (len(pair.b) - len(pair.a))
        for swapped in (False, True):
            seen = draw.gauss((lean if swapped else -lean) + 0.2, 0.7)
            sided = Verdict.FIRST if seen > 0 else Verdict.SECOND
            found.append(Look(pair, swapped, Reply(Verdict.TIE if abs(seen) < 0.15 else sided)))
    return found


def main() -> None:
    """Print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=5000, help="two verdicts each")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shown = looks(options.prompts, 0)
    start = time.monotonic()
    row = judged("a", "b", "judge", shown, seed=0)
    compared = time.monotonic() - start
    three = [
        game
        for number, pair in enumerate((("a", "b"), ("a", "c"), ("b", "c")))
        for game in games(*pair, looks(options.prompts // 3, number))
    ]
    start = time.monotonic()
    rank(three)
    found = {
        "verdicts": len(shown),
        "comparison_s": round(compared, 2),
        "ranking_s": round(time.monotonic() - start, 2),
        "win_rate": row["win_rate"],
    }
    print(json.dumps(found) if options.json else found)


if __name__ == "__main__":
    main()
