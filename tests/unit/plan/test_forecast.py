from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from amenable.cli import main as cli
from amenable.errors import UsageError
from amenable.pipeline.preflight import forecast_run
from amenable.plan import hardware as machines
from amenable.plan import rates
from amenable.plan.forecast import Forecast, comparison, forecast
from amenable.plan.hardware import hardware, memory_limit
from amenable.plan.remedy import refusal, refuse, remedies
from amenable.plan.shape import ModelShape, config_of, shape_of
from amenable.plan.text import lines

from .conftest import machine, recipe, rows

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def seven() -> ModelShape:
    return shape_of(config_of("llama-2-7b"), "llama-2-7b")


def of(shape: ModelShape, *settings: str, gib: float = 80, **changes: object) -> Forecast:
    own = machine(memory_bytes=int(gib * 2**30), **changes)
    return forecast(recipe("model.dtype=auto", *settings), shape, rows(), own)


def amenable(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["amenable", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_seven_billion_weights_by_hand(seven: ModelShape) -> None:
    """LoRA in bf16: base and roll-out copy are 13.5 GB each; every weight: 16 bytes and a copy of
    them, 20, of 6.74e9."""
    policy = next(s for s in of(seven).stages if s.name == "policy").memory
    assert policy.parts["weights"] == policy.parts["roll-out copy"] == 2 * 6_738_415_616
    full = of(seven, "model.lora.enabled=false")
    sft = next(s for s in full.stages if s.name == "sft").memory
    assert sft.total - sft.parts["process"] >= 20 * 6_738_415_616
    assert of(seven).fits
    assert not full.fits


def test_seven_billion_weights_in_four_bits(seven: ModelShape) -> None:
    """6.48e9 in linear layers at 0.516 bytes, embedding and head of 131e6 each at 2.

    Evaluation takes the exported model, which is whole: 13.5 GB and its cache.
    """
    policy = next(s for s in of(seven, "model.quantise=nf4").stages if s.name == "policy").memory
    assert policy.parts["weights"] == pytest.approx(3.87e9, rel=0.002)
    settings, then = remedies(of(seven, gib=15))
    assert settings[-1] == "model.quantise=nf4"
    assert then.fits
    peaks = {s.name: s.memory.total for s in then.stages}
    assert max(peaks, key=lambda name: peaks[name]) == "evaluate"


def test_what_does_not_fit_is_told_with_what_would(seven: ModelShape) -> None:
    full = of(seven, "model.lora.enabled=false")
    settings, then = remedies(full)
    assert settings[0] == "model.lora.enabled=true"
    assert then.fits
    text = refusal(full)
    assert "llama-2-7b does not fit: stage policy would take" in text
    assert "--set model.lora.enabled=true" in text
    assert text in lines(full)[-1]


def test_where_nothing_helps_a_smaller_model_is_advised(seven: ModelShape) -> None:
    small = of(seven, gib=4)
    settings, then = remedies(small)
    assert not then.fits
    assert then.peak_bytes <= small.peak_bytes
    assert "take a smaller model.base" in refusal(small)
    assert settings == [] or refusal(small).count("--set") == len(settings)


def test_only_a_clear_excess_is_refused(tiny_shape: ModelShape) -> None:
    """Refused when three fifths of the forecast are more than there is."""
    peak = of(tiny_shape).peak_bytes
    refuse(of(tiny_shape, gib=0.65 * peak / 2**30))
    with pytest.raises(UsageError, match="does not fit"):
        refuse(of(tiny_shape, gib=0.55 * peak / 2**30))


def test_micro_batches_that_fit_grow_with_the_machine(seven: ModelShape) -> None:
    found = {gib: of(seven, gib=gib).micro_batches for gib in (1, 40, 80)}
    assert [batch.key for batch in found[80]] == [
        "sft.micro_batch_tokens",
        "reward.micro_batch_tokens",
        "policy.micro_batch_tokens",
    ]
    assert all(batch.most == 0 for batch in found[1])
    for few, many in zip(found[40], found[80], strict=True):
        assert 0 < few.most < many.most


def test_hardware_names() -> None:
    assert hardware("8xH100").cards == 8
    assert hardware("rtx4090").memory_bytes == 24 * 2**30
    assert hardware("cpu").memory_bytes == memory_limit()
    for name in ("pocket", "0xh100", "8xcpu", "x"):
        with pytest.raises(UsageError, match=r"unknown; take cpu, l4, .*8xh100"):
            hardware(name)


def test_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(machines, "_CGROUPS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    assert memory_limit() == 1_000_000


def test_calibrated_rates_take_the_place_of_the_table(tiny_shape: ModelShape) -> None:
    """A file in the cache is read for this model, precision, adapter and machine, and no other."""
    own = hardware("cpu")
    config = recipe("model.lora.rank=4")
    before = forecast(config, tiny_shape, rows(), own)
    assert "not calibrated" in before.rates.origin
    identity = rates.identity(own, own.dtype("fp32"))
    path = rates.calibration_path(config, tiny_shape, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"fixed_s": 0.0, "each_s": 1.0}
    figures = dict.fromkeys(("step_s", "merge_s", "file_s", "startup_s"), 0.0)
    saved = {"forward": line, "train": line, "decode": line, **figures, "origin": "by hand"}
    path.write_text(json.dumps({"rates": saved}))
    after = forecast(config, tiny_shape, rows(), own)
    assert after.rates.origin == "by hand"
    work = after.stages[1].work
    assert after.stages[1].name == "sft"
    assert after.stages[1].seconds == work.tokens + work.fixed_s
    other = forecast(recipe("model.lora.rank=5"), tiny_shape, rows(), own)
    assert "not calibrated" in other.rates.origin
    path.write_text("{}")
    assert "not calibrated" in forecast(config, tiny_shape, rows(), own).rates.origin


def test_calibration_measures_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_shape: ModelShape
) -> None:
    from amenable.plan import calibrate

    monkeypatch.setenv("AMENABLE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_IMPORTS", "pass")
    config = recipe("model.lora.rank=4")
    found = calibrate.calibrate(config, tiny_shape, [(12, 4, 4)])
    assert min(found.train.each_s, found.forward.each_s) >= 0
    assert found.train.seconds(1, 480) > found.forward.seconds(1, 480) > 0
    assert found.decode.seconds(1, 32) > 0
    assert forecast(config, tiny_shape, rows(), hardware("cpu")).rates == found


def test_a_model_that_cannot_train_here_is_not_calibrated(seven: ModelShape) -> None:
    from amenable.plan.calibrate import calibrate

    config = recipe("model.lora.enabled=false")
    with pytest.raises(UsageError, match="llama-2-7b leaves no room"):
        calibrate(config, seven, [(12, 4)])


def test_command_prints_and_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("plan", "examples/tiny.toml", "--hardware", "8xh100")
    assert amenable(monkeypatch, *small) == 0
    text = capsys.readouterr().out
    assert "106,816 weights" in text
    assert "a process uses one of 8" in text
    assert text.splitlines()[-1] == "fits"
    large = ("--set", "model.base=llama-2-70b", "--hardware", "h100")
    assert amenable(monkeypatch, *small, *large) == 0
    assert "llama-2-70b does not fit" in capsys.readouterr().out
    assert amenable(monkeypatch, "plan", "examples/tiny.toml", "--hardware", "pocket") == 2
    assert "'pocket' is unknown" in capsys.readouterr().err
    assert amenable(monkeypatch, "plan", "--help") == 0
    assert "Example: amenable plan" in capsys.readouterr().out


def test_command_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert amenable(monkeypatch, "plan", "examples/demo.toml", "--hardware", "l4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == 134_515_008
    assert list(found["stages"]) == [
        "data",
        "sft",
        "collect",
        "reward",
        "policy",
        "evaluate",
        "report",
    ]
    for stage in found["stages"].values():
        assert stage["memory_bytes"] == pytest.approx(sum(stage["memory_parts"].values()), abs=9)
    assert found["peak_bytes"] == max(s["memory_bytes"] for s in found["stages"].values())
    assert found["fits"] is True


def test_run_is_refused_before_a_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines, "memory_limit", lambda: 2**20)
    out = tmp_path / "run"
    assert amenable(monkeypatch, "run", "examples/tiny.toml", "--out", str(out)) == 2
    assert "tiny does not fit: stage" in capsys.readouterr().err
    assert not (out / "models" / "sft").exists()


def test_forecast_that_fails_stops_nothing(tmp_path: Path) -> None:
    said = io.StringIO()
    config = recipe("model.base=nobody/nothing")
    assert forecast_run(config, tmp_path, said.write) is None
    assert said.getvalue().startswith("no forecast of memory and time: nobody/nothing")


def test_comparison_has_both_sides(tiny_shape: ModelShape) -> None:
    found = of(tiny_shape)
    measured = {"sft": {"peak_rss_gb": 0.5, "wall_s": 2.0, "fingerprint": "x"}}
    compared = comparison(found, measured)["stages"]
    assert list(compared) == ["sft"]
    assert compared["sft"]["measured_memory_gb"] == 0.5
    assert compared["sft"]["measured_wall_s"] == 2.0
    assert compared["sft"]["memory_gb"] > 0
