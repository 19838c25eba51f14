"""Random streams, each keyed by a purpose and a step, so that nothing depends on where a run was cut (law 4).

`seed_for(42, "dropout", step, micro_step)` is the same number in every process, on every machine, in every Python.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(root: int, *key: int | str) -> int:
    """The seed of one stream.

    Args:
        root: The run's seed.
        key: What the stream is for and where it stands, e.g. ("order", epoch).

    Returns:
        A number from 0 to 2^63 - 1.

    Example:
        >>> seed_for(42, "order", 0) == seed_for(42, "order", 0)
        True
    """
    text = "\x1f".join(str(part) for part in (root, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(count: int, root: int, *key: int | str) -> list[int]:
    """A shuffled range.

    Args:
        count: Length.
        root: The run's seed.
        key: The stream's key.

    Returns:
        The numbers 0 to count - 1 in the stream's order.
    """
    return [int(i) for i in np.random.default_rng(seed_for(root, *key)).permutation(count)]
