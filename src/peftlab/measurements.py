"""Measured numbers with blanks, NaN and infinities among them: their statistics, and how JSON keeps them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def describe(steps: Sequence[int], values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, spread and extremes of one column.

    Args:
        steps: The step of each row.
        values: The norm of each row, None where nothing was active.

    Returns:
        mean, std (population), max, min, peak_step (first step of the maximum), count, all over the finite values, None
        where there are none; `non_finite_steps`, the number of rows with NaN or an infinity.
    """
    active = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    found = [(step, value) for step, value in active if math.isfinite(value)]
    result: dict[str, Any] = dict.fromkeys(("mean", "std", "max", "min", "peak_step"))
    if found:
        numbers = [value for _, value in found]
        highest = max(numbers)
        result["mean"], result["std"] = mean_and_std(numbers)
        result["max"], result["min"] = highest, min(numbers)
        result["peak_step"] = next(step for step, value in found if value == highest)
    return result | {"count": len(found), "non_finite_steps": len(active) - len(found)}


def mean_and_std(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation, exactly summed, for numbers of any size.

    mean = sum x / n, std = sqrt(sum (x - mean)^2 / n)

    Args:
        numbers: At least one finite number.

    Returns:
        (mean, std); neither overflows, because the numbers are first divided by a power of two.

    Example:
        >>> mean_and_std([1.0, 2.0, 3.0, 2.0])
        (2.0, 0.7071067811865476)
    """
    size = max(abs(number) for number in numbers)
    exponent = math.frexp(size)[1]
    small = [math.ldexp(number, -exponent) for number in numbers]
    mean = min(max(math.fsum(small) / len(small), min(small)), max(small))
    variance = math.fsum((number - mean) ** 2 for number in small) / len(small)
    spread = min(math.sqrt(variance), max(small) - min(small))
    limit = math.nextafter(1.0, 0.0)
    return math.ldexp(mean, exponent), math.ldexp(min(spread, limit), exponent)


def ratio_of_means(upper: Sequence[float | None], lower: Sequence[float | None]) -> float | None:
    """Mean of one column over the mean of another, over the rows where both are active and finite.

    Args:
        upper: The column above the line.
        lower: The column below it.

    Returns:
        The ratio; None where no row has both, or the lower mean is 0.
    """
    both = [(a, b) for a, b in zip(upper, lower, strict=True) if a is not None and b is not None]
    both = [(a, b) for a, b in both if math.isfinite(a) and math.isfinite(b)]
    if not both:
        return None
    above, below = mean_and_std([a for a, _ in both])[0], mean_and_std([b for _, b in both])[0]
    ratio = above / below if below else math.inf
    return ratio if math.isfinite(ratio) else None


def finite(value: Any) -> Any:
    """JSON-ready values with NaN and infinities as the strings "nan", "inf" and "-inf", which `float` reads back.

    Args:
        value: Anything made of mappings, lists, tuples, numbers, strings and None.

    Returns:
        The same without non-finite numbers.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
