"""The comparison of methods: which are tried, at which rate, what is left out, and what the document's claims come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftlab.catalog import METHODS
from peftlab.config import build_config
from peftlab.errors import ConfigError, InputError
from peftlab.experiments import methods
from peftlab.run import RunFolder
from peftlab.settings import validate
from peftlab.study.carrying import Carried, DoneRun
from peftlab.study.planning import PlannedRun, plan_runs


@pytest.fixture(autouse=True)
def _ask_anew() -> None:
    methods._ask.cache_clear()


def test_each_method_begins_at_its_own_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_refusal", lambda config: "")
    settings = methods.Settings(methods=("lora", "ia3"), seeds=(1,))
    runs = plan_runs(methods.arms(settings), settings, tmp_path)
    assert [run.config.adapters[0].method for run in runs] == ["lora", "ia3"]
    rates = [run.config.training.learning_rate for run in runs]
    assert rates[0] == 8e-3
    assert rates[1] == pytest.approx(8e-3 * METHODS.load("ia3").RATE_TO_LORA, rel=0.05)
    assert all(run.config.schedule.strategy is None for run in runs)


def test_all_methods_that_need_no_settings_are_tried() -> None:
    assert set(methods._plain_methods()) == set(METHODS.names()) - {"peft"}
    assert all(METHODS.load(name).RATE_TO_LORA > 0 for name in methods._plain_methods())


def test_what_does_not_apply_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        methods, "_refusal", lambda config: "has no biases" if config.adapters[0].method == "ia3" else ""
    )
    settings = methods.Settings(methods=("lora", "ia3"))
    assert list(methods.arms(settings)) == ["lora"]
    assert methods.notes(settings) == ["Left out: ia3: has no biases"]
    with pytest.raises(InputError, match=r"no method applies: ia3: has no biases"):
        methods.arms(methods.Settings(methods=("ia3",)))


def test_what_cannot_be_run_says_why() -> None:
    settings = methods.Settings(methods=("full",), config={"model": {"dtype": "bfloat16"}})
    with pytest.raises(InputError, match=r"no method applies: full: .*bfloat16"):
        methods.arms(settings)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'lora'"):
        validate(methods.Settings, {"methods": ["loar"]})
    with pytest.raises(ConfigError, match=r"factors above 0"):
        validate(methods.Settings, {"factors": [0.0]})


def done(folder: Path, name: str, losses: dict[int, float], **result: Any) -> DoneRun:
    config = build_config({"output": {"directory": str(folder), "name": name}})
    run = RunFolder(folder / config.run_name())
    run.path.mkdir(parents=True)
    config.save(run.path / RunFolder.CONFIG)
    for step, loss in losses.items():
        run.append_event("validated", step=step, validation_loss=loss)
    plain = {"total_parameters": 1000, "steps": 100}
    return DoneRun(PlannedRun(name, 1, config), plain | result)


def test_the_documents_claims_are_measured(tmp_path: Path) -> None:
    full = done(
        tmp_path, "full", {25: 3.0, 50: 2.0, 100: 1.0}, trainable_parameters=1000, peak_memory_bytes=2000
    )
    quick = done(
        tmp_path, "quick", {25: 1.9, 50: 1.8, 100: 1.7}, trainable_parameters=20, peak_memory_bytes=100
    )
    late = done(
        tmp_path, "late", {25: 9.0, 50: 8.0, 100: 2.0}, trainable_parameters=200, peak_memory_bytes=1600
    )
    never = done(
        tmp_path, "never", {25: 9.0, 50: 8.0, 100: 7.0}, trainable_parameters=1, peak_memory_bytes=2500
    )
    runs = {"full": [full], "quick": [quick], "late": [late], "never": [never]}
    (table,) = methods.tables(Carried(runs))
    assert table.rows[1:] == [
        ["quick", "yes", "20.00", "yes", "25 against 50: faster"],
        ["late", "no: 20.00%", "1.25", "no", "100 against 50: slower"],
        ["never", "no: 0.10%", "0.80", "no", "not reached by 1 of 1 seeds"],
    ]
    assert methods.tables(Carried({"quick": [quick]})) == []
