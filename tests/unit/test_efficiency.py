"""S4's efficiency score, mended: monotone, bounded, from measured values, and what the document's own sum gets wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from run_folder_fixture import fabricate_run

from pages import check_page
from peftlab.efficiency import WEIGHTS, Measured, compare_efficiency, measure_efficiency, score_efficiency
from peftlab.errors import DataError, UnknownNameError
from peftlab.report import write_comparison
from peftlab.run import RunFolder

FULL = Measured(100_000_000, 1.6e9, 120.0, 80.0)
LORA = Measured(1_000_000, 0.4e9, 60.0, 79.0)
POSITIVE = st.floats(1e-6, 1e12)
MEASURED = st.builds(
    Measured, st.integers(1, 10**12), POSITIVE, POSITIVE, st.one_of(st.just(0.0), POSITIVE), st.just(True)
)


def by_the_document(measured: Measured) -> float:
    """The sum as the document writes it."""
    share = measured.trainable_parameters / FULL.trainable_parameters
    return share * 0.4 + share * 0.3 + measured.time_per_epoch * 0.2 + measured.performance / 100 * 0.1


def test_the_documents_sum_rewards_what_is_slow_and_large() -> None:
    assert by_the_document(FULL) == pytest.approx(24.78)
    assert by_the_document(LORA) == pytest.approx(12.09, abs=0.01)
    assert score_efficiency(LORA, FULL).efficiency_score > score_efficiency(FULL, FULL).efficiency_score


def test_the_parts_by_hand() -> None:
    found = score_efficiency(LORA, FULL)
    assert found.parameter_efficiency == pytest.approx(100 / 101)
    assert found.memory_efficiency == pytest.approx(1.6 / 2.0)
    assert found.training_speed == pytest.approx(120 / 180)
    assert found.model_performance == pytest.approx(79 / 159)
    assert found.efficiency_score == pytest.approx(0.4 * 100 / 101 + 0.3 * 0.8 + 0.2 * 2 / 3 + 0.1 * 79 / 159)
    assert math.fsum(WEIGHTS.values()) == pytest.approx(1)


@given(MEASURED, MEASURED)
def test_bounded_and_a_mirror(one: Measured, two: Measured) -> None:
    there, back = score_efficiency(one, two), score_efficiency(two, one)
    for part in (*WEIGHTS, "efficiency_score"):
        assert 0 <= getattr(there, part) <= 1
        assert getattr(there, part) + getattr(back, part) == pytest.approx(1)
    assert score_efficiency(one, one).efficiency_score == pytest.approx(0.5)


@given(MEASURED, MEASURED, st.floats(1.1, 10))
def test_monotone_in_every_value(own: Measured, baseline: Measured, factor: float) -> None:
    start = score_efficiency(own, baseline)
    changes: dict[str, dict[str, Any]] = {
        "parameter_efficiency": {"trainable_parameters": int(own.trainable_parameters * 10)},
        "memory_efficiency": {"peak_memory": own.peak_memory * factor},
        "training_speed": {"time_per_epoch": own.time_per_epoch * factor},
        "model_performance": {"performance": own.performance * factor + 1},
    }
    for part, change in changes.items():
        other = score_efficiency(replace(own, **change), baseline)
        before, after = getattr(start, part), getattr(other, part)
        assert after >= before if part == "model_performance" else after <= before
        if 1e-9 < before < 1 - 1e-9:
            assert after != before
        assert [getattr(other, p) for p in WEIGHTS if p != part] == [
            getattr(start, p) for p in WEIGHTS if p != part
        ]


def test_a_metric_that_is_better_when_low() -> None:
    low, high = (replace(FULL, performance=value, higher_is_better=False) for value in (2.0, 6.0))
    assert score_efficiency(low, high).model_performance == pytest.approx(0.75)
    nothing = replace(FULL, performance=0.0)
    assert score_efficiency(nothing, nothing).model_performance == 0.5
    with pytest.raises(DataError, match="give both the same metric"):
        score_efficiency(low, FULL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainable_parameters": 0}, "trainable_parameters is 0; a measured value that is more than 0"),
        ({"peak_memory": -1.0}, "peak_memory is -1.0"),
        ({"time_per_epoch": math.nan}, "time_per_epoch is nan"),
        ({"performance": -0.5}, "performance is -0.5; a measured value that is 0 or more"),
        ({"performance": math.inf}, "performance is inf"),
    ],
)
def test_what_nobody_can_have_measured_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        replace(FULL, **change)


def change_file(path: Path, **sections: dict[str, Any]) -> None:
    """Put other values into a JSON or YAML file of a run."""
    whole = yaml.safe_load(path.read_text())
    for name, section in sections.items():
        whole[name] = whole[name] | section
    path.write_text(json.dumps(whole))


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """LoRA, and full fine-tuning with four times the trained parameters, twice the memory and half the speed."""
    lora = fabricate_run(tmp_path, "lora", steps=12, layers=1)
    full = fabricate_run(tmp_path, "full", steps=12, layers=1)
    summary = lora.summary()
    counts = {"trainable_parameters": 4 * summary["counts"]["trainable_parameters"]}
    memory = {"host": 2 * summary["peak_memory_bytes"]["host"]}
    change_file(full.path / RunFolder.SUMMARY, counts=counts, peak_memory_bytes=memory)
    whole = full.summary() | {"tokens_per_second": summary["tokens_per_second"] / 2}
    (full.path / RunFolder.SUMMARY).write_text(json.dumps(whole))
    config = full.config | {"adapters": [{"method": "full", "settings": {}}]}
    (full.path / RunFolder.CONFIG).write_text(json.dumps(config))
    return lora, full


def test_read_from_runs(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    lora, full = runs
    measured = measure_efficiency(lora)
    steps = [event for event in lora.timeline() if event["event"] == "step"]
    seconds_per_step = steps[-1]["tokens"] / steps[-1]["step"] / lora.summary()["tokens_per_second"]
    assert measured.time_per_epoch == pytest.approx(seconds_per_step * lora.preflight["steps"]["per_epoch"])
    assert measured.performance == 61.3
    found = compare_efficiency(lora.path, full.path)
    assert found.parameter_efficiency == pytest.approx(0.8)
    assert found.memory_efficiency == pytest.approx(2 / 3)
    assert found.training_speed == pytest.approx(2 / 3)
    assert found.model_performance == 0.5
    page = check_page(write_comparison(runs), sortable=True)
    assert "<h2>Efficiency</h2>" in page
    assert f"{found.efficiency_score:.3f}" in page
    assert "against full, 0.5 where they are equal" in page
    assert "Performance is bleu." in page
    assert "<h2>Efficiency</h2>" not in write_comparison([lora, lora], tmp_path / "two.html").read_text()


def test_what_cannot_be_compared_is_said(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    lora, full = runs
    change_file(full.path / RunFolder.CONFIG, training={"batch_size": 99})
    with pytest.raises(
        DataError, match=r"lora and full cannot be compared: training\.batch_size \(.* and 99\) differ"
    ):
        compare_efficiency(lora, full)
    page = write_comparison(runs).read_text()
    assert "cannot be compared: training.batch_size" in page
    with pytest.raises(UnknownNameError, match="metric of this run 'blue'"):
        measure_efficiency(lora, "blue")
    open_run = fabricate_run(tmp_path, "open", steps=12, until="training")
    with pytest.raises(DataError, match="is no finished run"):
        measure_efficiency(open_run)
    (lora.path / "embedded_evaluation.json").unlink()
    with pytest.raises(DataError, match="run it without --no_eval"):
        measure_efficiency(lora)
