"""Logs of other trainers. `trl_logs/` holds the first rows of runs of TRL 1.16 (PPO: 1.12) on the
tiny model: the reward of `grpo.json` is always 1, the rate of `ppo.json` is 0.03.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from amenable.cli.main import app
from amenable.errors import DataError, UsageError
from amenable.health.logs import open_logs
from amenable.health.watch import check_rows

TRL = Path(__file__).parent / "trl_logs"


def said(path: Path, tags: Path | None = None) -> list[str]:
    return [f.rule for log in open_logs(path, tags) for f in check_rows(log.stage, log.rows)]


@pytest.mark.parametrize(
    ("name", "stage", "figures"),
    [
        ("sft", "sft", {"loss", "grad_norm"}),
        ("reward", "reward", {"rank_loss", "accuracy", "margin", "grad_norm"}),
        ("dpo", "policy", {"loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}),
        ("grpo", "policy", {"reward", "kl_loss", "entropy", "without_spread", "eos_rate"}),
        ("ppo", "policy", {"reward", "kl_loss", "entropy", "approx_kl", "clip_fraction"}),
    ],
)
def test_trl_is_told_by_its_tags(name: str, stage: str, figures: set[str]) -> None:
    (log,) = open_logs(TRL / f"{name}.json")
    assert log.stage == stage
    assert figures <= set(log.rows[0])
    assert [row["step"] for row in log.rows] == list(range(1, len(log.rows) + 1))


def test_what_is_wrong_with_trls_runs_is_found() -> None:
    assert said(TRL / "grpo.json") == ["cut-off", "no-spread"]
    assert said(TRL / "ppo.json") == ["step-too-far", "clipped"]


def test_a_checkpoint_folder_is_enough(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_bytes((TRL / "grpo.json").read_bytes())
    assert said(tmp_path) == ["cut-off", "no-spread"]


def test_the_share_that_was_cut_off_becomes_the_share_that_ended() -> None:
    raw = json.loads((TRL / "grpo.json").read_text())["log_history"][0]
    (log,) = open_logs(TRL / "grpo.json")
    assert log.rows[0]["eos_rate"] == pytest.approx(1 - raw["completions/clipped_ratio"])


def foreign(tmp_path: Path) -> tuple[list[dict[str, Any]], Path]:
    tags = tmp_path / "tags.toml"
    tags.write_text('stage = "policy"\n[tags]\n"a/kl" = "kl_loss"\n"a/len" = "completion_tokens"\n')
    return [{"step": n, "a/kl": 20.0, "a/len": 8.0, "other": "x"} for n in range(4)], tags


def test_any_json_lines_by_a_map(tmp_path: Path) -> None:
    rows, tags = foreign(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said(log, tags) == ["kl-far"]
    with pytest.raises(UsageError, match=r"cannot be told .* --tags FILE"):
        said(log)


def test_tensorboard_by_a_map(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    rows, tags = foreign(tmp_path)
    writer = tensorboard.SummaryWriter(str(tmp_path / "events"))
    for row in rows:
        for name in ("a/kl", "a/len"):
            writer.add_scalar(name, row[name], row["step"])
    writer.close()
    assert said(tmp_path / "events", tags) == ["kl-far"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('stage = "pol"\n[tags]\n', "stage: found 'pol'; expected one of sft, reward, policy"),
        ('stage = "sft"\ntags = 1\n', "tags: expected a table"),
        ("stage = \n", "it must be TOML"),
    ],
)
def test_a_faulty_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    tags = tmp_path / "tags.toml"
    tags.write_text(text)
    with pytest.raises(DataError, match=message):
        open_logs(TRL / "sft.json", tags)


def test_faulty_logs_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "log.jsonl"
    broken.write_text('{"step": 1, "loss": 2}\n{"step": 2,\n')
    with pytest.raises(DataError, match=r"log\.jsonl, line 2: no JSON"):
        open_logs(broken)
    with pytest.raises(UsageError, match="no such file"):
        open_logs(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="no rows yet"):
        open_logs(tmp_path / "empty.jsonl")
    state = tmp_path / "trainer_state.json"
    state.write_text("{}")
    with pytest.raises(DataError, match="log_history"):
        open_logs(state)


def test_the_command_tells_and_exits_with_1_where_a_rule_speaks(tmp_path: Path) -> None:
    bad = CliRunner().invoke(app, ["report", str(TRL / "grpo.json"), "--check", "--json"])
    assert bad.exit_code == 1
    found = json.loads(bad.stdout)
    assert [row["rule"] for row in found["health"]] == ["cut-off", "no-spread"]
    assert found["rules_asked"]["policy"] >= 5
    good = CliRunner().invoke(app, ["report", str(TRL / "sft.json"), "--check"])
    assert good.exit_code == 0
    assert "no rule speaks" in good.stdout


def test_a_run_that_is_writing_a_row_is_read_up_to_it(tmp_path: Path) -> None:
    metrics = tmp_path / "stages" / "policy" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    rows = [{"step": n, "policy/approx_kl": 0.2} for n in range(4)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "pol')
    assert said(tmp_path) == ["step-too-far"]
