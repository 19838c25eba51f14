"""How much rank does LoRA need? Ranks side by side, alpha growing with them, and what of each rank is used.

S1's rank sweep. Alpha is a fixed multiple of the rank, so that the update's scale, alpha by rank, is the same for all.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from peftlab.study.settings import StudySettings

QUESTION = "How much rank does LoRA need here?"


class Settings(StudySettings):
    """What can be set on the comparison."""

    ranks: tuple[int, ...] = (4, 8, 16, 32)
    """The ranks."""
    alpha_by_rank: float = Field(default=2.0, gt=0)
    """Alpha as a multiple of the rank."""
    targets: str = "both"
    """What is adapted."""

    @field_validator("ranks")
    @classmethod
    def _several(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ranks)) != len(ranks) or len(ranks) < 2 or min(ranks) < 1:
            raise ValueError("two or more different ranks are needed, none below 1")
        return ranks


def arms(settings: Settings) -> dict[str, dict[str, Any]]:
    """One arm for each rank.

    Args:
        settings: What was set.
    """
    return {
        f"rank {rank}": {
            "schedule.strategy": None,
            "method.name": "lora",
            "method.rank": rank,
            "method.alpha": settings.alpha_by_rank * rank,
            "method.targets": settings.targets,
        }
        for rank in settings.ranks
    }
