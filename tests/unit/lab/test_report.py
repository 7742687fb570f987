from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from amenable.algorithms import ALGORITHMS
from amenable.lab.report import picture, table, verdict
from amenable.lab.rows import Row
from amenable.lab.settings import GAP_BOUND, KL_BOUND, LOSS_GAP_BOUND, SETTINGS

GOOD = Row(
    check="fixed point",
    algorithm="ppo",
    setting="lambda 1",
    problem="one & two",
    beta=0.05,
    seed=0,
    target="pi_star",
    kl_to_target=0.002,
    objective_gap=0.004,
    passed=True,
    wall_s=2.0,
)
BAD = replace(GOOD, seed=1, kl_to_target=0.3, passed=False)
CAUGHT = replace(BAD, algorithm="none", setting="untrained", control=True)
MISSED = replace(GOOD, algorithm="rloo", setting="0.8 beta", control=True)


def test_the_verdict_wants_rows_to_pass_and_controls_to_fail() -> None:
    assert verdict([GOOD, CAUGHT])
    assert not verdict([GOOD, BAD, CAUGHT])
    assert not verdict([GOOD, MISSED])


def test_the_table_shows_the_worst_seed_of_a_cell() -> None:
    lines = table([GOOD, BAD, CAUGHT, MISSED]).splitlines()
    (cell,) = [line for line in lines if line.startswith("ppo")]
    assert "0.3000" in cell
    assert "FAILED 1/2" in cell
    assert [line.split()[-2:] for line in lines if line.startswith(("none", "rloo"))] == [
        ["caught", "1/1"],
        ["MISSED", "0/1"],
    ]
    assert lines[-1] == "2 of 4 as they should, 8 s of work"


def test_a_row_without_kl_has_a_dash() -> None:
    kto = replace(GOOD, kl_to_target=None)
    (cell,) = [line for line in table([GOOD, kto]).splitlines() if line.startswith("ppo")]
    assert "0.0020" in cell
    lonely = replace(kto, algorithm="kto", gradient_p_value=0.5)
    (cell,) = [line for line in table([GOOD, lonely]).splitlines() if line.startswith("kto")]
    assert cell.split()[-6:] == ["pi_star", "-", "0.0040", "0.5000", "ok", "1/1"]


def test_the_picture_is_xml_with_a_dot_for_each_row() -> None:
    rows = [GOOD, BAD, CAUGHT, replace(GOOD, kl_to_target=None, algorithm="kto")]
    root = ET.fromstring(picture(rows, 0.01))
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3
    assert titles[1] == "ppo, lambda 1, one & two, seed 1: 0.3 nats"
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "none: untrained (must fail)" in words
    assert "bound 0.01" in words


def test_the_documented_table_has_every_row_and_holds() -> None:
    """docs/lab.md shows what `make lab` printed: each setting, within its bounds."""
    page = (Path(__file__).parents[3] / "docs" / "lab.md").read_text(encoding="utf-8")
    lines = page[page.index("## Results") :].splitlines()
    found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] in ALGORITHMS:
            found[cells[0], cells[1]] = cells[3:]
    assert list(found) == [(setting.algorithm, setting.name) for setting in SETTINGS]
    for (algorithm, _), cells in found.items():
        for cell in cells:
            kl, _, gap = cell.partition(" / ")
            bound = 100 * (LOSS_GAP_BOUND if algorithm == "kto" else GAP_BOUND)
            assert float(gap.removesuffix(" %")) <= bound
            assert kl == "–" or float(kl.removeprefix("< ")) <= KL_BOUND
