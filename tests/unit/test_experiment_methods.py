"""The comparison of methods: what is tried, what is chosen, what is shown; the runs themselves are stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.catalog import METHODS
from peftlab.config import RunConfig
from peftlab.errors import ConfigError, InputError, RunError
from peftlab.experiments import methods
from peftlab.settings import validate

LOWEST = {"lora": 8e-3, "ia3": 7.7e-3}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configs of runs that are asked for; a run's loss grows with the distance from its method's best rate."""
    asked: list[RunConfig] = []

    def carry_out(config: RunConfig, configs: Path) -> dict[str, Any]:
        asked.append(config)
        method, rate = config.adapters[0].method, config.training.learning_rate
        score = {"value": 50.0, "interval": [40.0, 60.0], "unit": "0-100"}
        return {
            "run": config.run_name(),
            "learning_rate": rate,
            "validation_loss": 1 + abs(rate - LOWEST[method]),
            "metrics": {"bleu": score} if config.evaluation.enabled else {},
            "trainable_parameters": 100,
            "total_parameters": 1000,
            "steps": config.training.max_steps,
            "seconds": 61.0,
            "tokens_per_second": 1234.0,
            "peak_memory_bytes": 1 << 30,
            "adapter_bytes": 1 << 20,
            "versions": {},
        }

    monkeypatch.setattr(methods, "_carry_out", carry_out)
    return asked


def test_each_method_is_compared_at_its_own_learning_rate(runs: list[RunConfig], tmp_path: Path) -> None:
    settings = methods.Settings(methods=("lora", "ia3"), max_steps=60)
    said: list[str] = []
    table, numbers = methods.carry_out(settings, tmp_path, lambda text: said.append(str(text)))
    assert [(c.adapters[0].method, c.training.max_steps, c.evaluation.enabled) for c in runs] == [
        ("lora", 20, False), ("lora", 20, False), ("lora", 20, False), ("lora", 60, True),
        ("ia3", 20, False), ("ia3", 20, False), ("ia3", 20, False), ("ia3", 60, True),
    ]  # fmt: skip
    assert [c.training.learning_rate for c in runs[3::4]] == [8e-3, 7.7e-3]
    assert all(c.schedule.strategy is None for c in runs)
    assert not any(c.evaluation.before for c in runs[3::4])
    plain = [c.model_dump(exclude={"adapters", "output", "training"}) for c in runs[3::4]]
    assert plain[0] == plain[1], "same model, task, decoding"
    assert "perhaps better beyond: ia3" in table.read_text(encoding="utf-8")
    assert "no winner is named" in said[-1]
    assert json.loads(numbers.read_text(encoding="utf-8"))["done"].keys() == {"lora", "ia3"}


def test_all_methods_that_need_no_settings_are_tried() -> None:
    assert set(methods._plain_methods()) == set(METHODS.names()) - {"peft"}
    assert all(METHODS.load(name).RATE_TO_LORA > 0 for name in methods._plain_methods())


def test_what_does_not_apply_is_left_out_with_its_reason(
    runs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        methods, "_refusal", lambda config: "has no biases" if config.adapters[0].method == "ia3" else ""
    )
    table, _ = methods.carry_out(methods.Settings(methods=("lora", "ia3")), tmp_path, lambda text: None)
    assert "Left out: ia3: has no biases" in table.read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"no method applies: ia3: has no biases"):
        methods.carry_out(methods.Settings(methods=("ia3",)), tmp_path, lambda text: None)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'lora'"):
        validate(methods.Settings, {"methods": ["loar"]})
    with pytest.raises(ConfigError, match=r"at least one factor above 0"):
        validate(methods.Settings, {"factors": [0.0]})


def test_a_failed_run_says_how_to_go_on(tmp_path: Path) -> None:
    settings = methods.Settings(methods=("lora",), model=str(tmp_path / "nowhere"))
    config = methods._config(settings, "lora", 1.0, tmp_path)
    with pytest.raises(RunError, match=r"exit code 2.*not done again with --set runs="):
        methods._carry_out(config, tmp_path / "configs")
