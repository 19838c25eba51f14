"""Phases or not: whether schedules that open and freeze parts of a LoRA learn more than training everything.

S1's second question, at equal steps: the four strategies against the static run. What each phase trains is listed, since a
schedule that trains fewer parameters for a part of the run is cheaper, not only different.
"""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from peftlab.schedule import STRATEGIES, canonical_strategy
from peftlab.study.carrying import Carried, DoneRun
from peftlab.study.settings import StudySettings
from peftlab.study.telling import Table
from peftlab.tables import show_count

QUESTION = "Does a phase schedule learn more than training everything all the time, at equal steps?"
STATIC = "static"


class Settings(StudySettings):
    """What can be set on the comparison."""

    rank: int = 8
    """Rank of every adapter."""
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """The strategies that are compared with the static run."""
    phase1_end: int | None = None
    """Step at which the first phase ends; none divides the run evenly."""
    phase2_end: int | None = None
    """Step at which the second phase of the strategies of three ends; none divides the rest evenly."""

    @field_validator("strategies")
    @classmethod
    def _known(cls, strategies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(canonical_strategy(name) for name in strategies)


def arms(settings: Settings) -> dict[str, dict[str, Any]]:
    """The static run and each strategy.

    Args:
        settings: What was set.
    """
    common = {"method.name": "lora", "method.rank": settings.rank, "method.targets": "both"}
    found = {STATIC: common | {"schedule.strategy": None}}
    for name in settings.strategies:
        ends = {"schedule.phase1_end": settings.phase1_end}
        if len(STRATEGIES[name]) > 2:
            ends["schedule.phase2_end"] = settings.phase2_end
        found[name] = common | {"schedule.strategy": name} | ends
    return found


def tables(carried: Carried) -> list[Table]:
    """What each phase trains.

    Args:
        carried: The runs.
    """
    rows = [["arm", "phase", "steps", "trainable", "share of training everything"]]
    most = max(phase["trainable_parameters"] for runs in carried.done.values() for phase in _phases(runs[0]))
    for arm, runs in carried.done.items():
        phases = _phases(runs[0])
        whole = sum(phase["end_step"] - phase["start_step"] for phase in phases)
        for phase in phases:
            steps = phase["end_step"] - phase["start_step"]
            share = steps * phase["trainable_parameters"] / (whole * most)
            rows.append(
                [
                    arm,
                    phase["name"],
                    f"{phase['start_step'] + 1:,}-{phase['end_step']:,}",
                    show_count(phase["trainable_parameters"]),
                    f"{share:.0%}",
                ]
            )
    return [Table("What each phase trains", rows)]


def _phases(run: DoneRun) -> list[dict[str, Any]]:
    """The phases of a run, with what each trained."""
    return list(run.run.summary()["phases"])
