"""A sweep: what a space holds, which points are tried, what is told; the runs themselves are stood in for."""

from __future__ import annotations

import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from test_study import FinishedRuns

from peftlab.config import RunConfig
from peftlab.errors import ConfigError, InputError
from peftlab.experiments import sweep
from peftlab.run import RunFolder
from peftlab.settings import validate
from peftlab.study import carrying, search
from peftlab.study.space import GRIDS, grid_points, random_points, read_space

SPACE = {
    "method": {"rank": [2, 4, 8]},
    "training": {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
}


class StandIn:
    """A run whose validation loss is lowest at rank 4 and a rate of 0.01."""

    def __init__(self) -> None:
        self.asked: list[RunConfig] = []
        self.die_at: int | None = None

    def __call__(self, config: RunConfig, configs: Path, *, give_up: Any = None) -> dict[str, Any]:
        if self.die_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append(config)
        rank = config.adapters[0].settings["rank"]
        loss = abs(rank - 4) + abs(config.training.learning_rate - 0.01)
        run = RunFolder(config.output.directory / config.run_name())
        run.path.mkdir(parents=True, exist_ok=True)
        (run.path / RunFolder.CONFIG).write_text("{}")
        run.append_event("validated", step=2, validation_loss=loss)
        if give_up is not None and give_up(run):
            return {}
        (run.path / RunFolder.DONE).touch()
        cost = {"trainable_parameters": 10 * rank, "seconds": 1.0, "peak_memory_bytes": 5}
        return cost | {"validation_loss": loss, "run": run.name}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(search, "carry_out_run", stand_in)
    return stand_in


def settings_of(**more: Any) -> sweep.Settings:
    static = {"schedule": {"strategy": None}}
    return validate(sweep.Settings, {"space": SPACE, "config": static, "max_steps": 4} | more)


def carry_out(settings: sweep.Settings, folder: Path) -> tuple[dict[str, Any], list[str]]:
    folder.mkdir(parents=True)
    said: list[str] = []
    files = sweep.carry_out(settings, folder, lambda text: said.append(str(text)))
    found: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
    return found, said


def test_a_grid_has_every_combination_once() -> None:
    axes = read_space(
        {
            "method.rank": [2, 4],
            "training": {"learning_rate": {"low": 1.0, "high": 4.0, "log": True, "points": 3}},
        }
    )
    points = [tuple(point.values()) for point in grid_points(axes)]
    assert points == list(itertools.product([2, 4], [1.0, 2.0, 4.0]))
    assert read_space({"a": {"low": 1, "high": 5, "points": 3}})[0].grid() == (1, 3, 5)


def test_random_points_stay_inside_differ_and_do_not_depend_on_their_number() -> None:
    axes = read_space(SPACE)
    many = list(itertools.islice(random_points(axes, seed=3), 50))
    assert many[:7] == list(itertools.islice(random_points(axes, seed=3), 7))
    assert len({str(point) for point in many}) == 50
    assert all(1e-3 <= p["training.learning_rate"] <= 1e-1 and p["method.rank"] in (2, 4, 8) for p in many)
    assert len(list(random_points(read_space({"a": [1, 2, 3]}), seed=1))) == 3


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"a": 3}, r"space.a is 3; expected a list"),
        ({"a": []}, r"a list of different values"),
        ({"a": [1, 1]}, r"a list of different values"),
        ({"a": {"low": 2, "high": 1}}, r"low must be a number below high"),
        ({"a": {"low": 0, "high": 1, "log": True}}, r"begins above 0"),
        ({"a": {"low": 0, "high": 1, "points": 0}}, r"points is a whole number"),
    ],
)
def test_a_space_that_is_none_is_refused(space: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_space(space)


def test_a_range_without_points_and_a_grid_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a grid takes points"):
        grid_points(read_space({"a": {"low": 0, "high": 1}}))
    with pytest.raises(ConfigError, match=r"the grid has 1,000,000 points"):
        grid_points(read_space({name: list(range(100)) for name in "abc"}))


def test_the_documents_grids_are_whole_and_valid(tmp_path: Path) -> None:
    points = {
        name: [p for space in grid for p in grid_points(read_space(space))] for name, grid in GRIDS.items()
    }
    assert {name: len(found) for name, found in points.items()} == {"lora": 48, "p_tuning": 12, "adalora": 12}
    trials = search.Trials(settings_of(), tmp_path, tmp_path, print)
    for name, found in points.items():
        for point in (found[0], found[-1]):
            assert trials.plan(point)[0].config.adapters[0].method == name


def test_the_best_point_is_told_and_nothing_is_done_twice(train: StandIn, tmp_path: Path) -> None:
    settings = settings_of(sampler="random", trials=12)
    found, said = carry_out(settings, tmp_path / "one")
    assert found["best"]["method.rank"] == 4
    assert not any(config.evaluation.enabled for config in train.asked), "a sweep looks at no test answer"
    assert any("best of 12: --set method.rank=4" in text for text in said)
    again, _ = carry_out(settings, tmp_path / "two")
    assert again == found


def test_values_that_do_not_go_together_are_told_and_the_rest_is_tried(
    train: StandIn, tmp_path: Path
) -> None:
    found, said = carry_out(settings_of(space={"method": {"rank": [4, -1]}}), tmp_path / "one")
    assert len(train.asked) == 1
    assert "not valid" in found["trials"][1]["note"]
    assert any("no value: method.rank=-1" in text for text in said)


def test_the_best_point_is_confirmed_with_fresh_seeds(
    train: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = FinishedRuns({"as-it-was": 0.2, "best": 0.8})
    monkeypatch.setattr(carrying, "carry_out_run", scored)
    settings = settings_of(space={"method": {"rank": [2, 4]}}, confirm=3, eval_samples=24, resamples=200)
    _, said = carry_out(settings, tmp_path / "one")
    assert len(scored.asked) == 6
    assert {name.split("-seed")[1][0] for name in scored.asked} == {"2", "3", "4"}, "seeds that chose nothing"
    assert any("best is better than every other arm" in text for text in said)
    assert (tmp_path / "one" / "confirmed" / "report.html").is_file()


def test_optuna_finds_the_best_and_goes_on_after_a_kill(train: StandIn, tmp_path: Path) -> None:
    settings = settings_of(sampler="tpe", trials=8)
    train.die_at = 5
    with pytest.raises(KeyboardInterrupt):
        carry_out(settings, tmp_path / "one")
    train.die_at = None
    with_dead = pytest.MonkeyPatch()
    with_dead.setattr(search, "_lives", lambda process: process != os.getpid())
    try:
        found, _ = carry_out(settings, tmp_path / "two")
    finally:
        with_dead.undo()
    values = [trial["value"] for trial in found["trials"]]
    assert len(values) == 8
    assert len({str(trial["point"]) for trial in found["trials"]}) == 8
    fresh = [config.run_name() for config in train.asked]
    assert len(set(fresh)) == 8, "the point of the killed trial is tried after all"
    more, _ = carry_out(settings_of(sampler="tpe", trials=10), tmp_path / "three")
    assert len(more["trials"]) == 10


def test_optuna_gives_up_what_is_worse(train: StandIn, tmp_path: Path) -> None:
    found, said = carry_out(settings_of(sampler="tpe", trials=12, prune=True), tmp_path / "one")
    given_up = [trial for trial in found["trials"] if trial["note"].startswith("given up")]
    assert given_up
    assert min(t["value"] for t in found["trials"] if t["value"] is not None) < 1
    assert any("given up" in text for text in said)


def test_this_process_lives_and_none_lives_at_the_last_number() -> None:
    assert search._lives(os.getpid())
    assert not search._lives(2**22 + 1)
    assert platform.node() is not None


def test_a_sweep_without_a_space_says_how_one_is_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a sweep needs a space or a grid: --set"):
        sweep.carry_out(sweep.Settings(), tmp_path, print)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"space": SPACE, "grid": "lora"}, r"one of both"),
        ({"space": SPACE, "prune": True}, r"belong to sampler=tpe"),
        ({"space": {"a": 1}}, r"expected a list of values"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(sweep.Settings, values)
