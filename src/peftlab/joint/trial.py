"""Whether a model computes the losses of several runs apart: tried on their own rows before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peftlab.errors import ModelError
from peftlab.joint.meeting import Meeting
from peftlab.joint.shares import join_batches
from peftlab.layout import sample_rows
from peftlab.objective import ModelLoss
from peftlab.passes import RowPasses
from peftlab.training import TrainingParts

_FULL, _HALF = 1e-4, 2e-2
"""How far two losses may differ that are the same, as a share: in float32 or wider, and in half precision."""


def try_together(meeting: Meeting, runs: Mapping[str, TrainingParts]) -> None:
    """Compare the losses of a joint pass with the model's own, each run alone; B is given values meanwhile.

    Args:
        meeting: Where passes are computed.
        runs: Name to what its trainer is made of.

    Raises:
        ModelError: They differ, or the pass fails.
    """
    joined = meeting.joined
    model, device = joined.model, next(joined.model.parameters()).device
    rows = {
        name: sample_rows(parts.train_rows[i:] or parts.train_rows)
        for i, (name, parts) in enumerate(runs.items())
    }
    was_training = model.training
    zeros = [p for made in joined.attachments.values() for p in made.parameters().values() if not p.any()]
    model.eval()
    try:
        with torch.no_grad():
            for number, parameter in enumerate(zeros):  # an adapter that adds nothing would hide whose it is
                parameter.copy_(
                    torch.linspace(-0.02 - 0.01 * (number % 7), 0.05, parameter.numel()).view_as(parameter)
                )
            batches = {}
            alone = []
            for name, parts in runs.items():
                passes = RowPasses(parts.attachment, parts.collator, parts.isolation)
                batches[name] = {key: value.to(device) for key, value in passes.collate(rows[name]).items()}
                with joined.alone(name), passes.around(batches[name]):
                    alone.append(float(ModelLoss(joined.head).total(model, batches[name])))
            batch, shares = join_batches(batches, pad_id=meeting.pad_id)
            together = [float(total) for total in meeting.totals(batch, shares)]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"these runs cannot share a pass: {reason}") from error
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
        model.train(was_training)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    for name, one, other in zip(runs, alone, together, strict=True):
        if not abs(one - other) <= (_HALF if half else _FULL) * max(abs(one), 1.0):
            raise ModelError(
                f"these runs cannot share a pass: the loss of {name} is {other:.6g} among the others and {one:.6g} alone"
            )
