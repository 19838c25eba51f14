"""What a sweep goes through: config keys with their values or ranges, as a grid, at random, or as Optuna suggests."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peftlab.errors import ConfigError

_RANGE_KEYS = {"low", "high", "log", "points"}
MOST_GRID = 10_000
"""A grid of more points is a slip of the pen."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One config key that is varied.

    Attributes:
        key: The dotted key, e.g. "method.rank".
        values: What it takes; None for a range.
        low: The range's lower end.
        high: Its upper end.
        log: Whether the range is gone through by factors.
        points: How many points of the range a grid takes; None where it takes none.
    """

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    points: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the range has whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def grid(self) -> tuple[Any, ...]:
        """The points of a grid.

        Raises:
            ConfigError: It is a range without points.
        """
        if self.values is not None:
            return self.values
        if self.points is None:
            raise ConfigError(
                f"space.{self.key} is a range, and a grid takes points: give points: 5, or a list, or sampler=random"
            )
        if self.points == 1:
            return (self.low,)
        shares = [i / (self.points - 1) for i in range(self.points)]
        return tuple(dict.fromkeys(self.at(share) for share in shares))

    def at(self, share: float) -> Any:
        """The value at a share of the way, from 0 to 1.

        Args:
            share: How far along.
        """
        if self.values is not None:
            return self.values[min(len(self.values) - 1, int(share * len(self.values)))]
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(self.high, max(self.low, round(value))) if self.whole else float(f"{value:.4g}")


def read_space(space: Mapping[str, Any], path: str = "") -> list[Axis]:
    """The axes of a nested mapping.

    Args:
        space: Config keys, nested or dotted, to a list of values or to {low, high, log, points}.
        path: Where the mapping stands.

    Returns:
        The axes, in their order.

    Raises:
        ConfigError: A value is neither, a list is empty, or a range is no range.

    Example:
        >>> [axis.key for axis in read_space({"method": {"rank": [4, 8]}})]
        ['method.rank']
    """
    axes = []
    for name, value in space.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, list | tuple):
            if not value or any(value.count(item) > 1 for item in value):
                raise ConfigError(f"space.{key}: a list of different values is needed, got {list(value)}")
            axes.append(Axis(key, tuple(value)))
        elif isinstance(value, Mapping) and {"low", "high"} <= value.keys() <= _RANGE_KEYS:
            axes.append(_range(key, value))
        elif isinstance(value, Mapping) and value:
            axes += read_space(value, key)
        else:
            raise ConfigError(
                f"space.{key} is {value!r}; expected a list of values such as [4, 8], or a range such as {{low: 1e-4, high:"
                " 1e-2, log: true}"
            )
    return axes


def _range(key: str, value: Mapping[str, Any]) -> Axis:
    """A range."""
    low, high, points = value["low"], value["high"], value.get("points")
    numbers = [v for v in (low, high) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)) or low >= high:
        raise ConfigError(f"space.{key}: low must be a number below high, got {low!r} and {high!r}")
    log = bool(value.get("log", False))
    if log and low <= 0:
        raise ConfigError(f"space.{key}: a range by factors begins above 0, got {low!r}")
    if points is not None and (not isinstance(points, int) or points < 1):
        raise ConfigError(f"space.{key}: points is a whole number from 1, got {points!r}")
    return Axis(key, None, low, high, log, points)


def grid_points(axes: list[Axis]) -> list[dict[str, Any]]:
    """Every combination.

    Args:
        axes: The axes.

    Returns:
        Key to value, the last axis fastest.

    Raises:
        ConfigError: There are far too many, or a range has no points.
    """
    columns = [axis.grid() for axis in axes]
    if math.prod(map(len, columns)) > MOST_GRID:
        raise ConfigError(
            f"the grid has {math.prod(map(len, columns)):,} points; take fewer, or sampler=random with trials"
        )
    return [dict(zip([a.key for a in axes], point, strict=True)) for point in itertools.product(*columns)]


def random_points(axes: list[Axis], *, seed: int) -> Iterator[dict[str, Any]]:
    """Points at random, none twice while there are others; the same for the same seed, however many are taken.

    Args:
        axes: The axes.
        seed: Seeds the draws.

    Yields:
        Key to value.
    """
    generator = random.Random(seed)
    seen: set[str] = set()
    misses = 0
    while misses < 1000:
        point = {axis.key: axis.at(generator.random()) for axis in axes}
        if str(point) in seen:
            misses += 1
            continue
        misses = 0
        seen.add(str(point))
        yield point


GRIDS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {
            "method.name": ["lora"],
            "method.rank": [4, 8, 16, 32],
            "method.alpha": [8, 16, 32, 64],
            "method.dropout": [0.0, 0.1, 0.2],
        },
    ),
    "p_tuning": (
        {
            "method.name": ["p_tuning"],
            "method.num_virtual_tokens": [10, 20, 50, 100],
            "method.encoder_hidden_size": [256, 512, 1024],
        },
    ),
    "adalora": (
        {
            "method.name": ["adalora"],
            "method.target_rank": [4, 8, 16],
            "method.rank_allocation": ["importance", "magnitude", "uniform"],
        },
        {"method.name": ["adalora"], "method.initial_rank": [4, 8, 16], "method.adaptive_rank": [False]},
    ),
}
"""The efficient fine-tuning document's grids, of one or more spaces: without adaptive ranks nothing is allocated."""
