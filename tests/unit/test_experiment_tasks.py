"""The table of tasks: base and adapter of each task side by side; the runs are stood in for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_study import FinishedRuns

from peftlab.catalog import METRICS
from peftlab.config import RunConfig
from peftlab.errors import ConfigError
from peftlab.experiments import tasks
from peftlab.files import write_json, write_text
from peftlab.run import RunFolder
from peftlab.settings import validate
from peftlab.study import carrying
from peftlab.task_data import load_splits


class BeforeAndAfter(FinishedRuns):
    """Runs whose base is never right, and whose adapter is half the time."""

    def _write_answers(self, run: RunFolder, config: RunConfig, arm: str) -> None:
        examples = load_splits(config.task, seed=config.data_seed).test[: config.evaluation.num_samples]
        halves: dict[str, Any] = {}
        for when, count in (("before", 0), ("after", len(examples) // 2)):
            answers = [e.references[0] if i < count else "~" for i, e in enumerate(examples)]
            scores = {"rouge_l": METRICS.load("rouge_l").score(answers, examples, seed=1).to_dict()}
            rows = [{"id": e.id, "prediction": a} for e, a in zip(examples, answers, strict=True)]
            file = f"predictions.{when}.jsonl"
            write_text(run.path / file, "".join(json.dumps(row) + "\n" for row in rows))
            halves[when] = {"metrics": scores, "decoding": {"kind": "greedy"}, "predictions": file}
        write_json(run.path / "embedded_evaluation.json", halves)


@pytest.mark.parametrize(("seeds", "said"), [(3, "after is better"), (1, "no winner is named")])
def test_each_task_is_compared_with_its_own_base(
    seeds: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, folder = BeforeAndAfter({"embedded": 0.5}), tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.setattr(carrying, "carry_out_run", runs)
    settings = validate(
        tasks.Settings, {"seeds": seeds, "eval_samples": 24, "max_steps": 4, "resamples": 200}
    )
    table, numbers = tasks.carry_out(settings, folder, lambda text: None)
    (row,) = [line for line in table.read_text(encoding="utf-8").splitlines() if "rouge_l" in line]
    assert row.startswith("| embedded | rouge_l | 0.00 | 50.00 | +50.00 |")
    assert row.endswith(f"{said} |")
    found = json.loads(numbers.read_text(encoding="utf-8"))["tasks"]["embedded"]["rouge_l"]
    assert found["values"] == {"before": [0.0] * seeds, "after": [50.0] * seeds}
    assert len(runs.asked) == seeds


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean"):
        validate(tasks.Settings, {"tasks": {"embeded": None}})
