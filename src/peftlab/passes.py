"""How the passes of a run over its rows are computed: how rows lie, and where in the model a pass begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from peftlab.batches import Collator, EpochOrder, PackingCollator, Row
from peftlab.family import FamilyMap
from peftlab.isolation import Isolation
from peftlab.method import Attachment
from peftlab.schedule import Phase
from peftlab.trunk import CutTrial, Trunk, cache_root, canonical_tokens, find_cut, trunk_key, try_cut
from peftlab.trunk_cache import TrunkCache, make_room

_GIGABYTE = 10**9
_WORTH = 0.7
"""The share of a phase's tokens up to which filling the cache is worth it."""


class RowPasses:
    """Makes batches of rows and computes passes over them.

    Args:
        attachment: The adapter on its base.
        collator: Makes padded batches.
        isolation: Keeps the rows of packed batches apart; None pads them.
        trunk_bytes: Most bytes that hidden states of frozen blocks may take on disk; 0 keeps none.
    """

    def __init__(
        self, attachment: Attachment, collator: Collator, isolation: Isolation | None, *, trunk_bytes: int = 0
    ) -> None:
        self._attachment, self._isolation, self._trunk_bytes = attachment, isolation, trunk_bytes
        self._padded = collator
        self.collate: Collator | PackingCollator = collator if isolation is None else PackingCollator()
        self.trunk: Trunk | None = None

    @contextmanager
    def around(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """A context for the forward and backward pass over one batch.

        Args:
            batch: From `collate`, on the model's device.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            if self._isolation is not None:
                stack.enter_context(self._isolation.rows(batch["position_ids"]))
            if self.trunk is not None:
                stack.enter_context(self.trunk.fed(batch))
            yield

    def enter(
        self,
        phase: Phase,
        active: Sequence[str],
        order: EpochOrder,
        train: Sequence[Row],
        others: Sequence[Row],
    ) -> dict[str, Any]:
        """Keep the states of the blocks that are frozen in a phase, where that is right and worth it.

        Args:
            phase: The phase that begins or goes on.
            active: Names of the tensors that train in it.
            order: The order of rows.
            train: The training rows.
            others: The validation rows.

        Returns:
            What was found, for a log: "trunk", and the number of blocks, rows and bytes where states are kept.
        """
        self.close()
        if not self._trunk_bytes:
            return {"trunk": "not kept: training.trunk_cache_gigabytes is 0"}
        family, model = self._attachment.family, self._attachment.model
        cut, rows, reason = rows_to_keep(family, active, phase, order, train, others)
        if reason:
            return {"trunk": f"not kept: {reason}"}
        trial = try_cut(model, family, rows[:3], cut, active, pad_id=self._padded.pad_id)
        if trial.reason:
            return {"trunk": f"not kept: {trial.reason}"}
        return self._open(trial, cut, rows)

    def _open(self, trial: CutTrial, cut: int, rows: list[list[int]]) -> dict[str, Any]:
        """Open the cache and fill it."""
        model, family = self._attachment.model, self._attachment.family
        dtype = next(p.dtype for n, p in model.named_parameters() if n in trial.below)
        key = trunk_key(model, trial.below, cut)
        size = sum(len(row) for row in rows) * trial.width * dtype.itemsize
        if not make_room(cache_root(), key, needed=size, limit=self._trunk_bytes):
            limit = self._trunk_bytes / _GIGABYTE
            return {
                "trunk": f"not kept: {size / _GIGABYTE:.3g} GB are more than training.trunk_cache_gigabytes={limit:g}"
            }
        cache = TrunkCache(cache_root(), key, width=trial.width, dtype=dtype)
        self.trunk = Trunk(model, family, cut, cache, self._padded.pad_id, trial.in_tuples)
        computed = self.trunk.fill(rows)
        return {
            "trunk": f"kept: {cut} blocks below the lowest that trains",
            "trunk_blocks": cut,
            "trunk_rows": len(rows),
            "trunk_rows_computed": computed,
            "trunk_bytes": size,
        }

    def close(self) -> None:
        """Have passes begin at the tokens again."""
        if self.trunk is not None:
            self.trunk.cache.close()
        self.trunk = None


def rows_to_keep(
    family: FamilyMap,
    active: Sequence[str],
    phase: Phase,
    order: EpochOrder,
    train: Sequence[Row],
    others: Sequence[Row],
) -> tuple[int, list[list[int]], str]:
    """The rows whose hidden states are worth keeping in a phase, by what is known before a run.

    Args:
        family: The map of the model with its adapter.
        active: Names of the tensors that train in the phase.
        phase: The phase.
        order: The order of rows.
        train: The training rows.
        others: The validation rows.

    Returns:
        How many blocks lie below all that trains; the tokens of each row, once; why none is kept, "" where they are.
    """
    cut, reason = find_cut(family, active)
    if not cut:
        return 0, [], reason
    visits = [train[i] for step in range(phase.start_step, phase.end_step) for i in order.rows_of_step(step)]
    rows = [list(ids) for ids in dict.fromkeys(tuple(row.input_ids) for row in [*visits, *others])]
    spent = canonical_tokens([len(row) for row in rows])
    if spent > _WORTH * sum(len(row.input_ids) for row in visits):
        return cut, [], f"{len(rows):,} rows are seen {len(visits):,} times, too seldom to be worth it"
    return cut, rows, ""


def foretell_trunk(
    family: FamilyMap,
    active: Sequence[str],
    phase: Phase,
    order: EpochOrder,
    rows: tuple[Sequence[Row], Sequence[Row]],
    *,
    bytes_per_token: int,
    gigabytes: float,
) -> list[str]:
    """What keeping hidden states will take in a phase, said before a run.

    Args:
        family: The map of the model with its adapter.
        active: Names of the tensors that train in the phase.
        phase: The phase.
        order: The order of rows.
        rows: The training and the validation rows.
        bytes_per_token: Of one hidden state.
        gigabytes: Most that they may take.

    Returns:
        One sentence, or none where nothing is kept.
    """
    cut, kept, _ = rows_to_keep(family, active, phase, order, *rows) if gigabytes else (0, [], "")
    if not kept:
        return []
    size = sum(len(row) for row in kept) * bytes_per_token / _GIGABYTE
    if size > gigabytes:
        told = f"would take {size:.3g} GB and are not kept (training.trunk_cache_gigabytes={gigabytes:g})"
    else:
        told = f"are kept on disk, {size:.3g} GB, unless dropout acts there"
    return [f"phase '{phase.name}': the hidden states of {len(kept):,} rows below layer {cut} {told}"]
