"""Carry out the runs of an experiment: none twice, a killed one from where it was, the learning rate of each arm first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlab.run import RunFolder
from peftlab.run_series import carry_out_run, carry_out_together, choose_lowest, read_run
from peftlab.study.planning import Arms, PlannedRun, plan_runs
from peftlab.study.settings import StudySettings
from peftlab.tables import show_seconds

Show = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class DoneRun:
    """A finished run of an experiment.

    Attributes:
        planned: What was asked for.
        result: What came out, as of `run_series.read_run`.
    """

    planned: PlannedRun
    result: Mapping[str, Any]

    @property
    def run(self) -> RunFolder:
        """Its folder."""
        return RunFolder(self.planned.folder)


@dataclass(frozen=True, slots=True)
class Carried:
    """All runs of an experiment.

    Attributes:
        done: Arm to its runs, in the order of the seeds.
        tried: Arm to the shorter runs that chose its learning rate; empty where there was nothing to choose.
    """

    done: dict[str, list[DoneRun]]
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def carry_out_runs(
    arms: Arms, settings: StudySettings, directory: Path, configs: Path, show: Show
) -> Carried:
    """Carry out every run that is not finished.

    Args:
        arms: What is compared.
        settings: What was set.
        directory: The folder of the runs.
        configs: Where config files for processes go.
        show: Is given a line for each run.

    Returns:
        The runs.

    Raises:
        ConfigError: The runs would not be compared fairly, or a config is not valid.
        RunError: A run failed; the finished ones stay.
    """
    plan_runs(arms, settings, directory)  # refuses before anything is computed
    tried = _choose_rates(arms, settings, directory, configs, show)
    factors = {arm: float(choose_lowest(found)["factor"]) for arm, found in tried.items()}  # type: ignore[index]
    planned = plan_runs(arms, settings, directory, factors=factors)
    done: dict[str, list[DoneRun]] = {arm: [] for arm in arms}
    if settings.together:
        reason = carry_out_together([run.config for run in planned], configs)
        show(f"each run trains alone: {reason}" if reason else "runs that had not begun trained together")
    for run, result in zip(planned, carry_out_planned(planned, configs, show), strict=True):
        done[run.arm].append(DoneRun(run, result))
    return Carried(done, tried)


def carry_out_planned(planned: Sequence[PlannedRun], configs: Path, show: Show) -> list[dict[str, Any]]:
    """Carry out runs, each in a process of its own.

    Args:
        planned: The runs.
        configs: Where config files for processes go.
        show: Is given a line for each run.

    Returns:
        What came out, in the same order.

    Raises:
        RunError: A run failed.
    """
    results = []
    for place, run in enumerate(planned, start=1):
        found = RunFolder(run.folder)
        there = found.is_finished
        result = read_run(found, run.config) if there else carry_out_run(run.config, configs)
        told = "was there" if there else f"{result['steps']} steps in {show_seconds(result['seconds'])}"
        show(f"{place}/{len(planned)} {run.arm}, seed {run.seed}: {told}, validation loss {_loss(result)}")
        results.append(result)
    return results


def _choose_rates(
    arms: Arms, settings: StudySettings, directory: Path, configs: Path, show: Show
) -> dict[str, list[dict[str, Any]]]:
    """Shorter runs at every factor with the first seed; nothing where there is one factor."""
    if len(settings.factors) < 2:
        return {}
    whole = plan_runs(arms, settings, directory, seeds=settings.seeds[:1])[0].config.training.max_steps
    steps = settings.choosing_steps or max(1, whole // 3)
    tried: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for factor in settings.factors:
        planned = plan_runs(
            arms, settings, directory, seeds=settings.seeds[:1], factors=dict.fromkeys(arms, factor),
            steps=steps, scored=False,
        )  # fmt: skip
        for run, result in zip(planned, carry_out_planned(planned, configs, show), strict=True):
            tried[run.arm].append(result | {"factor": factor})
    return tried


def _loss(result: Mapping[str, Any]) -> str:
    """The lowest validation loss of a run."""
    loss = result["validation_loss"]
    return "-" if loss is None else f"{loss:.4f}"
