"""The largest size whose peak fits, found in few steps because the peak is convex in the size."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence


def largest_fitting(
    sizes: Sequence[int], peak_of: Callable[[int], int], limit: int, *, near: int | None = None
) -> int | None:
    """The largest size whose peak is within a limit.

    A bisection guided by lines. The peak is convex in the size: it is the largest of many sums, one for each instant, and
    each grows with the size. So the line through a size that fits and one that does not leads to one that fits, and the
    line through two that fit to one beyond which none does. They take turns until neighbours are known.

    Args:
        sizes: Rising.
        peak_of: The peak of a size, in bytes; rising.
        limit: Bytes.
        near: A size to begin with, where one of `sizes` is thought to be near or known already.

    Returns:
        The size; None where not even the first fits. It fits and its successor does not, however convex the peak is.

    Example:
        >>> largest_fitting(range(1, 1000), lambda size: 7 + 3 * size, 100)
        31
    """
    peaks: dict[int, int] = {}

    def fits(place: int) -> bool:
        peaks[place] = peak_of(sizes[place])
        return peaks[place] <= limit

    def reach(one: int, other: int) -> int:
        rise = (peaks[other] - peaks[one]) / (sizes[other] - sizes[one])
        size = sizes[one] + (limit - peaks[one]) / max(rise, 1.0)
        return bisect.bisect_right(sizes, size) - 1

    if not sizes or not fits(0):
        return None
    low, high = 0, len(sizes)
    guess = sizes.index(near) if near in sizes else 1
    for turn in itertools.count():
        if high - low == 1:
            break
        if fits(min(max(guess, low + 1), high - 1)):
            low = max(place for place in peaks if peaks[place] <= limit)
        else:
            high = min(place for place in peaks if peaks[place] > limit)
        below = [place for place in peaks if place < low]
        use_upper = high in peaks and (turn % 2 == 0 or not below)
        guess = reach(low, high) if use_upper else reach(max(below), low) if below else low + 1
    return sizes[low]
