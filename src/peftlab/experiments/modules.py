"""Attention, MLP or both: where LoRA learns most, and what the gradient says.

S1's first question, at equal steps, rows and decoding. The gradient's ratio of attention to MLP is of the run that trains
both, since only there do both have adapters.
"""

from __future__ import annotations

from typing import Any

from peftlab.study.carrying import Carried
from peftlab.study.settings import StudySettings
from peftlab.study.telling import Table

QUESTION = "Where does LoRA learn most: in attention, in the MLP, or in both?"


class Settings(StudySettings):
    """What can be set on the comparison."""

    rank: int = 8
    """Rank of every adapter; both has about the parameters of the two others together."""


def arms(settings: Settings) -> dict[str, dict[str, Any]]:
    """Three sets of targets.

    Args:
        settings: What was set.
    """
    static = {"schedule.strategy": None, "method.name": "lora", "method.rank": settings.rank}
    return {targets: static | {"method.targets": targets} for targets in ("attention", "mlp", "both")}


def tables(carried: Carried) -> list[Table]:
    """The gradient norms of attention and MLP where both train.

    Args:
        carried: The runs.
    """
    rows = [["seed", "gradient norm, attention / MLP", "the same per parameter (RMS)"]]
    for run in carried.done["both"]:
        found = run.run.gradient_log().summarize()
        keys = ("attention_to_mlp_ratio", "attention_to_mlp_ratio_per_parameter")
        cells = ["-" if found.get(key) is None else f"{found[key]:.3f}" for key in keys]
        rows.append([str(run.planned.seed), *cells])
    return [Table("Gradients of the runs that train both", rows)]
