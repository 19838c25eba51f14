"""The machine for questions: which runs there are, what is unfair, what the data may be said to decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftlab.catalog import EXPERIMENTS
from peftlab.config import RunConfig
from peftlab.errors import ConfigError, RunError
from peftlab.experiments import modules, ranks, schedules
from peftlab.files import write_json, write_text
from peftlab.run import RunFolder
from peftlab.settings import validate
from peftlab.study import carrying, conducting
from peftlab.study.planning import check_alike, plan_runs
from peftlab.study.scoring import judge
from peftlab.study.settings import StudySettings
from peftlab.task_data import load_splits

SMALL: dict[str, Any] = {"max_steps": 4, "eval_samples": 24, "resamples": 200}
STATIC = {"schedule.strategy": None}
ARMS = {"r2": STATIC | {"method.rank": 2}, "r4": STATIC | {"method.rank": 4}}


def planned(settings: StudySettings, directory: Path, arms: Any = ARMS, **more: Any) -> list[Any]:
    return plan_runs(arms, settings, directory, **more)


class FinishedRuns:
    """Stands in for training: writes the files of a run whose answers are right as often as its arm says."""

    def __init__(self, right: dict[str, float], *, noise: int = 0) -> None:
        self.right, self.noise, self.asked = right, noise, list[str]()

    def __call__(self, config: RunConfig, configs: Path) -> dict[str, Any]:
        run = RunFolder(config.output.directory / config.run_name())
        self.asked.append(run.name)
        run.path.mkdir(parents=True)
        arm = next(name for name in self.right if run.name.startswith(f"{name}-seed"))
        loss = abs(config.training.learning_rate - 0.008) + self.right[arm]
        config.save(run.path / RunFolder.CONFIG)
        summary = {
            "best_checkpoint": {"validation_loss": loss, "step": 1},
            "counts": {"trainable_parameters": 10, "total_parameters": 100},
            "steps": config.training.max_steps, "seconds": {"train": 2.0}, "tokens_per_second": 50.0,
            "peak_memory_bytes": {"host": 1000, "device": None}, "phases": [],
        }  # fmt: skip
        write_json(run.path / RunFolder.SUMMARY, summary)
        write_json(run.path / RunFolder.ENVIRONMENT, {"versions": {}, "hardware": {"processor": "x"}})
        write_json(run.path / RunFolder.PREFLIGHT, {"steps": {"rows_per_step": 8}})
        if config.evaluation.enabled:
            self._write_answers(run, config, arm)
        (run.path / RunFolder.EVENTS).touch()
        (run.path / RunFolder.DONE).touch()
        return carrying.read_run(run, config)

    def _write_answers(self, run: RunFolder, config: RunConfig, arm: str) -> None:
        from peftlab.catalog import METRICS

        examples = load_splits(config.task, seed=config.data_seed).test[: config.evaluation.num_samples]
        count = round(self.right[arm] * len(examples)) + self.noise * config.training.seed
        answers = [e.references[0] if i < count else "~" for i, e in enumerate(examples)]
        scores = {
            n: METRICS.load(n).score(answers, examples, seed=1).to_dict()
            for n in ("rouge_l", "value_coverage")
        }
        rows = [{"id": e.id, "prediction": a} for e, a in zip(examples, answers, strict=True)]
        write_text(run.path / "predictions.after.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        half = {"metrics": scores, "decoding": {"kind": "greedy"}, "predictions": "predictions.after.jsonl"}
        write_json(run.path / "embedded_evaluation.json", {"before": None, "after": half})


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    def stand_in(right: dict[str, float], **more: Any) -> FinishedRuns:
        runs = FinishedRuns(right, **more)
        monkeypatch.setattr(carrying, "carry_out_run", runs)
        return runs

    return stand_in


def test_every_arm_meets_every_seed_on_the_same_rows(tmp_path: Path) -> None:
    runs = planned(StudySettings(seeds=2, **SMALL), tmp_path)  # type: ignore[arg-type]
    assert [(run.arm, run.seed) for run in runs] == [("r2", 1), ("r4", 1), ("r2", 2), ("r4", 2)]
    assert [run.config.training.seed for run in runs] == [1, 1, 2, 2]
    assert {run.config.data_seed for run in runs} == {42}
    assert [run.config.adapters[0].settings["rank"] for run in runs] == [2, 4, 2, 4]
    assert len({run.folder for run in runs}) == 4
    assert all(not run.config.evaluation.before and run.config.evaluation.num_samples == 24 for run in runs)


@pytest.mark.parametrize(
    "key", ["training.max_steps", "training.batch_size", "task.max_length", "evaluation.num_beams"]
)
def test_unequal_effort_data_or_decoding_is_refused(key: str, tmp_path: Path) -> None:
    arms = {"one": ARMS["r2"], "other": ARMS["r2"] | {key: 9}}
    settings = StudySettings(seeds=(1,), config={"evaluation": {"decoding": "beam"}})
    if key == "training.max_steps":  # the machine sets it for all
        runs = planned(settings, tmp_path)
        longer = runs[1].config.training.model_copy(update={"max_steps": 9})
        runs[1] = type(runs[1])("r4", 1, runs[1].config.model_copy(update={"training": longer}))
        with pytest.raises(ConfigError, match=r"training.max_steps is 420 and 9"):
            check_alike(runs, ARMS)
        return
    with pytest.raises(ConfigError, match=rf"one and other would not be compared fairly: {key}"):
        planned(settings, tmp_path, arms)


def test_a_difference_that_no_arm_names_is_refused(tmp_path: Path) -> None:
    runs = planned(StudySettings(seeds=(1,)), tmp_path)
    changed = runs[1].config.training.model_copy(update={"weight_decay": 0.5})
    runs[1] = type(runs[1])("r4", 1, runs[1].config.model_copy(update={"training": changed}))
    with pytest.raises(ConfigError, match=r"weight_decay is 0.01 and 0.5.*does not say"):
        check_alike(runs, ARMS)


def test_one_arm_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two arms or more, got r2"):
        planned(StudySettings(), tmp_path, {"r2": ARMS["r2"]})


def test_a_wrong_setting_names_its_arm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^r0: .*rank"):
        planned(StudySettings(), tmp_path, {"r0": {"method.rank": 0}, "r2": {"method.rank": 2}})


def test_a_clear_difference_has_a_winner_and_noise_has_none(train: Any, tmp_path: Path) -> None:
    train({"r2": 0.2, "r4": 0.8})
    settings = StudySettings(**SMALL)
    done = carrying.carry_out_runs(ARMS, settings, tmp_path / "a", tmp_path, lambda _: None).done
    verdict = judge(done, settings)[0]
    assert (verdict.metric, verdict.winner) == ("rouge_l", "r4")
    assert verdict.sentence == "rouge_l: r4 is better than every other arm"
    train({"r2": 0.5, "r4": 0.5})
    done = carrying.carry_out_runs(ARMS, settings, tmp_path / "b", tmp_path, lambda _: None).done
    assert [v.sentence for v in judge(done, settings)] == [
        "rouge_l: not decided",
        "value_coverage: not decided",
    ]


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_winner_below_three_seeds(seeds: int, train: Any, tmp_path: Path) -> None:
    train({"r2": 0.0, "r4": 1.0})
    settings = StudySettings(seeds=seeds, **SMALL)  # type: ignore[arg-type]
    done = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None).done
    for verdict in judge(done, settings):
        assert verdict.winner is None
        assert not verdict.differences
        assert f"no winner is named: {seeds} seed" in verdict.sentence


def test_seeds_that_disagree_decide_nothing(train: Any, tmp_path: Path) -> None:
    """Over examples the difference is clear, over seeds it is not."""
    runs = train({"r2": 0.5, "r4": 0.6})
    settings = StudySettings(**SMALL)
    shares = {1: 0.3, 2: 0.95, 3: 0.5}
    original = runs._write_answers

    def uneven(run: RunFolder, config: RunConfig, arm: str) -> None:
        runs.right["r4"] = shares[config.training.seed]
        original(run, config, arm)

    runs._write_answers = uneven
    done = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None).done
    assert judge(done, settings)[0].sentence == "rouge_l: not decided"


def test_answers_of_another_run_are_noticed(train: Any, tmp_path: Path) -> None:
    train({"r2": 0.2, "r4": 0.8})
    settings = StudySettings(**SMALL)
    done = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None).done
    there, other = (done[arm][0].run.path / "predictions.after.jsonl" for arm in ("r2", "r4"))
    there.write_bytes(other.read_bytes())
    with pytest.raises(RunError, match=r"the files do not belong together"):
        judge(done, settings)


def test_runs_that_were_asked_something_else_are_not_compared(train: Any, tmp_path: Path) -> None:
    train({"r2": 0.2, "r4": 0.8})
    settings = StudySettings(**SMALL)
    done = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None).done
    file = done["r4"][1].run.path / "predictions.after.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match=r"cannot be compared: the test examples differ"):
        judge(done, settings)


def test_the_learning_rate_of_each_arm_is_chosen_by_validation(train: Any, tmp_path: Path) -> None:
    runs = train({"r2": 0.2, "r4": 0.8})
    settings = StudySettings(factors=(0.5, 1.0, 2.0), **SMALL)
    carried = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None)
    assert [len(found) for found in carried.tried.values()] == [3, 3]
    assert {r.planned.config.training.learning_rate for found in carried.done.values() for r in found} == {
        8e-3
    }
    assert len(runs.asked) == 3 * 2 + 2 * 3


def test_what_is_finished_is_not_done_again_and_gives_the_same_tables(train: Any, tmp_path: Path) -> None:
    runs = train({"attention": 0.2, "mlp": 0.5, "both": 0.8})
    monkey = modules.tables
    settings = modules.Settings(**SMALL)
    try:
        del modules.tables  # the stand-in writes no gradients
        first = conducting.conduct(modules, settings, _new(tmp_path, "one"), lambda _: None)  # type: ignore[arg-type]
        assert len(runs.asked) == 9
        again = conducting.conduct(modules, settings, _new(tmp_path, "two"), lambda _: None)  # type: ignore[arg-type]
    finally:
        modules.tables = monkey
    assert len(runs.asked) == 9
    assert [f.name for f in first] == ["table.md", "results.json", "runs.csv", "report.html"]
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again]
    table = first[0].read_text(encoding="utf-8")
    assert "rouge_l: both is better than every other arm" in table
    assert "both - attention" in table
    assert json.loads(first[1].read_text(encoding="utf-8"))["metrics"]["rouge_l"]["winner"] == "both"
    assert len(first[2].read_text(encoding="utf-8").splitlines()) == 10
    page = first[3].read_text(encoding="utf-8")
    assert 'class="sortable"' in page
    assert "http" not in page.replace("http://www.w3.org", "")


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def test_a_run_of_another_experiment_is_found_whatever_its_arm_is_called(train: Any, tmp_path: Path) -> None:
    runs = train({"r2": 0.2, "r4": 0.8, "two": 0.2, "four": 0.8})
    settings = StudySettings(seeds=(1,), **SMALL)
    first = carrying.carry_out_runs(ARMS, settings, tmp_path, tmp_path, lambda _: None).done
    renamed = {"two": ARMS["r2"], "four": ARMS["r4"]}
    again = carrying.carry_out_runs(renamed, settings, tmp_path, tmp_path, lambda _: None).done
    assert len(runs.asked) == 2
    assert again["two"][0].run.path == first["r2"][0].run.path
    assert again["two"][0].result == first["r2"][0].result


def test_what_phases_train_is_measured_against_training_everything(tmp_path: Path) -> None:
    class Done:
        def __init__(self, *phases: tuple[int, int, int]) -> None:
            self.run = self
            self.phases = [
                {"name": str(i), "start_step": a, "end_step": b, "trainable_parameters": n}
                for i, (a, b, n) in enumerate(phases)
            ]

        def summary(self) -> dict[str, Any]:
            return {"phases": self.phases}

    runs: Any = {"static": [Done((0, 10, 100))], "halves": [Done((0, 5, 50), (5, 10, 50))]}
    (table,) = schedules.tables(carrying.Carried(runs))
    assert [row[-1] for row in table.rows[1:]] == ["100%", "25%", "25%"]


def test_the_experiments_name_arms_that_are_valid(tmp_path: Path) -> None:
    for leaf, count in ((modules, 3), (schedules, 5), (ranks, 4)):
        settings = leaf.Settings()
        assert len(plan_runs(leaf.arms(settings), settings, tmp_path)) == 3 * count  # type: ignore[attr-defined]
    found = schedules.arms(schedules.Settings(phase1_end=100, phase2_end=200))
    runs = plan_runs(found, schedules.Settings(seeds=(1,)), tmp_path)
    assert [len(run.config.make_schedule().phases) for run in runs] == [1, 3, 3, 3, 2]


def test_settings_speak_to_a_person() -> None:
    with pytest.raises(ConfigError, match=r"1 to 10 different seeds"):
        validate(StudySettings, {"seeds": [1, 1]})
    with pytest.raises(ConfigError, match=r"smallest first"):
        validate(StudySettings, {"factors": [2, 1]})
    assert validate(StudySettings, {"seeds": 4}).seeds == (1, 2, 3, 4)
    assert {"modules", "schedules", "ranks"} <= set(EXPERIMENTS.names())
