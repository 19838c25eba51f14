"""What can be set on every experiment that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from peftlab.seeded_scores import MOST_SEEDS
from peftlab.settings import Settings


def _counted(seeds: Any) -> Any:
    """A number as so many seeds."""
    return range(1, seeds + 1) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds that are."""
    if len(set(seeds)) != len(seeds) or not 1 <= len(seeds) <= MOST_SEEDS or min(seeds) < 0:
        raise ValueError(f"1 to {MOST_SEEDS} different seeds are needed, none below 0")
    return seeds


def _ordered(factors: tuple[float, ...]) -> tuple[float, ...]:
    """Factors that are."""
    if not factors or min(factors) <= 0 or list(factors) != sorted(set(factors)):
        raise ValueError("factors above 0 are needed, each once, smallest first")
    return factors


Seeds = Annotated[tuple[int, ...], BeforeValidator(_counted), AfterValidator(_different)]
"""Different seeds; a number N stands for 1 to N."""
Factors = Annotated[tuple[float, ...], AfterValidator(_ordered)]
"""Factors on a learning rate, smallest first."""


class StudySettings(Settings):
    """The settings of a comparison; an experiment adds its own."""

    model: str | None = None
    """A model's folder or hub name; none is the preset's."""
    preset: str | None = "embedded"
    """The preset that gives task, rows, steps and batch size; none where a config file is given."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Config of all runs, laid over the preset: `--set config.task.name=e2e_nlg`, or a run's config file as CONFIG."""
    seeds: Seeds = (1, 2, 3)
    """Seeds of order, adapter and dropout; a number N stands for 1 to N. From three on a winner may be named."""
    data_seed: int = Field(default=42, ge=0)
    """Seeds which rows are trained on and asked, the same for all runs."""
    factors: Factors = (1.0,)
    """Factors on the learning rate, smallest first. Of several each arm takes the one of the lowest validation loss, found
    with the first seed and shorter runs."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps of each run; none is the preset's."""
    choosing_steps: int | None = Field(default=None, ge=1)
    """Steps of the runs that choose a learning rate; none is a third of a run's."""
    eval_samples: int | None = Field(default=None, ge=1)
    """Test examples; none is all."""
    resamples: int = Field(default=10_000, ge=100)
    """Resamples and swaps of each test."""
    together: bool = False
    """Whether runs that can share passes of one base do so; time and memory are then of all of them, and not compared."""
    runs: Path | None = None
    """Folder of the runs; what is finished there is not done again. None is `runs` beside the experiments' folders."""
