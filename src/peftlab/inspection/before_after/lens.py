"""What each layer would say: its output through the model's own final norm and head, on both sides.

The norm and the head are those of the certified map. Scales and soft caps behind the head are found and the whole is proved
on the first rows: what the lens makes of the last layer must be the model's own logits, on both sides; else there is no
lens, and the reason is told.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from peftlab.batches import IGNORED
from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.attention_source import run
from peftlab.inspection.before_after.passages import Batch
from peftlab.inspection.before_after.sides import OUTPUT, Sides, Tensors

LENS_COLUMNS = 8
"""Positions of each batch that every layer is asked at."""
_MOST_LOGITS = 1 << 25
"""Logits that are held at once."""
_FULL, _HALF = 1e-4, 3e-2
"""How far the lens may be from the model's logits, relative to the largest: in float32 or wider, in half precision."""


class Lens:
    """Final norm and head on the output of any layer.

    Args:
        sides: Both sides.
        stack: The stack that speaks.

    Raises:
        ModelError: The map has no head, or none that is proved.
    """

    def __init__(self, sides: Sides, stack: str) -> None:
        self.sides, self.stack = sides, stack
        self._scale, self._cap = 1.0, 0.0
        for family in (sides.base_family, sides.tuned_family):
            proved = [c.head for c in family.certificates if c.head != "none"]
            if not _head_path(family) or not proved:
                raise ModelError(f"it is not proved what the head of this {family.model_type} model is")

    def prove(self, batch: Batch, base: Tensors, tuned: Tensors) -> None:
        """Find what stands behind the head, and try that the last layer's lens gives the model's own logits.

        Args:
            batch: Some passages.
            base: Layer to states (batch, seq, hidden) of the base.
            tuned: The same of the tuned model.

        Raises:
            ModelError: It does not.
        """
        rows = len(batch.numbers)

        def answer(model: Any, _: FamilyMap, times: int) -> torch.Tensor:
            device = next(model.parameters()).device
            placed = {name: torch.cat([t.to(device)] * times) for name, t in batch.inputs.items()}
            logits: torch.Tensor = run(model, placed).logits
            return logits[:, -batch.width :]

        own = self._halves(self.sides.both(rows, answer))
        seen = self.logits(base[OUTPUT], tuned[OUTPUT])
        real = batch.real.to(own[0].device)
        self._scale = _scale_of(own[0][real], seen[0][real])
        self._cap = float(getattr(_config(self.sides.tuned), "final_logit_softcapping", None) or 0.0)
        if self._cap:
            self._scale = 1.0
        seen = self.logits(base[OUTPUT], tuned[OUTPUT])
        for name, one, other in zip(("base", "tuned model"), own, seen, strict=True):
            half = torch.finfo(one.dtype).eps > 1e-6
            off = float((one[real].float() - other[real].float()).abs().max() / one[real].float().abs().max())
            if not off <= (_HALF if half else _FULL):
                raise ModelError(
                    f"norm and head on the last layer of the {name} are {off:.2g} of the largest logit away from its own"
                    " logits"
                )

    def logits(self, base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What states would say.

        Args:
            base: States (batch, columns, hidden) of the base.
            tuned: The same of the tuned model.

        Returns:
            Logits (batch, columns, vocab) of both.
        """
        given = (base, tuned) if self.sides.num_passes == 2 else (torch.cat([base, tuned]),)
        states = iter(given)

        def speak(model: Any, family: FamilyMap, _: int) -> torch.Tensor:
            hidden = next(states)
            norm = _norm_path(family, self.stack)
            hidden = model.get_submodule(norm)(hidden) if norm else hidden
            raw: torch.Tensor = model.get_submodule(_head_path(family))(hidden) * self._scale
            return self._cap * torch.tanh(raw / self._cap) if self._cap else raw

        return self._halves(self.sides.both(len(base), speak))

    def _halves(self, found: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides of what `Sides.both` gave."""
        one, other = found if isinstance(found, tuple) else found.chunk(2)
        return one, other


class LensSums:
    """What the lens shows of each layer, summed over tokens.

    Args:
        lens: The lens.
        layers: Layers of the base.
    """

    def __init__(self, lens: Lens, layers: list[int]) -> None:
        self.lens = lens
        self._sums = {layer: torch.zeros(4, dtype=torch.float64) for layer in layers}
        self._tokens = self._targets = 0

    def add(self, base: Tensors, tuned: Tensors, batch: Batch) -> None:
        """Take a batch.

        Args:
            base: Layer to states (batch, seq, hidden) of the base.
            tuned: The same of the tuned model.
            batch: The passages.
        """
        places = np.linspace(min(1, batch.width - 1), batch.width - 1, LENS_COLUMNS).round().astype(int)
        columns = torch.from_numpy(np.unique(places))
        real, targets = batch.real[:, columns], batch.targets[:, columns]
        self._tokens += int(real.sum())
        self._targets += int((targets != IGNORED).sum())
        for layer, sums in self._sums.items():
            one, other = self.lens.logits(base[layer][:, columns], tuned[layer][:, columns])
            log_p, log_q = (_precise(side).log_softmax(dim=-1) for side in (one, other))
            divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
            agree = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double()
            for place, values in enumerate((divergence, agree)):
                sums[place] += torch.where(real, values.double().cpu(), 0.0).sum()
            for place, side in enumerate((log_p, log_q), start=2):
                sums[place] += _losses(side, targets.to(side.device)).double().sum().cpu()

    def means(self) -> dict[int, dict[str, float | None]]:
        """The means.

        Returns:
            Layer to kl (nats), same_top (rate), lens_loss_base and lens_loss_tuned (nats; None where nothing was to be
            said).
        """
        names = ("kl", "same_top", "lens_loss_base", "lens_loss_tuned")
        counts = (self._tokens, self._tokens, self._targets, self._targets)
        return {
            layer: {
                n: total / c if c else None for n, total, c in zip(names, sums.tolist(), counts, strict=True)
            }
            for layer, sums in self._sums.items()
        }

    @property
    def tokens(self) -> int:
        """Tokens that were asked at."""
        return self._tokens


def passage_losses(
    lens: Lens, base: torch.Tensor, tuned: torch.Tensor, batch: Batch
) -> Iterator[tuple[int, tuple[float, float, int]]]:
    """The loss of every passage of a batch on both sides.

    Args:
        lens: The lens, proved.
        base: States (batch, seq, hidden) of the last layer of the base.
        tuned: The same of the tuned model.
        batch: The passages.

    Yields:
        The passage's number; the summed loss of the base and of the tuned model in nats, and how many tokens were said.
    """
    totals = torch.zeros(2, len(batch.numbers), dtype=torch.float64)
    start, step = 0, 1  # the size of the vocabulary becomes known with the first piece
    while start < batch.width:
        piece = slice(start, start + step)
        sides = lens.logits(base[:, piece], tuned[:, piece])
        targets = batch.targets[:, piece]
        for side, logits in enumerate(sides):
            found = _losses(_precise(logits).log_softmax(dim=-1), targets.to(logits.device))
            totals[side] += found.double().sum(dim=1).cpu()
        start += step
        step = max(1, _MOST_LOGITS // (2 * len(batch.numbers) * sides[0].shape[-1]))
    counts = (batch.targets != IGNORED).sum(dim=1).tolist()
    for row, number in enumerate(batch.numbers):
        yield number, (float(totals[0, row]), float(totals[1, row]), int(counts[row]))


def _losses(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p of each target, 0 where there is none; (batch, columns)."""
    said = targets != IGNORED
    picked = log_probabilities.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(said, -picked, 0.0)


def _head_path(family: FamilyMap) -> str:
    """The path of the head; "" where the map has none."""
    return next((site.path for site in family.sites if site.role == "head"), "")


def _norm_path(family: FamilyMap, stack: str) -> str:
    """The path of the final norm in the live model; "" where there is none. Proofs have the paths of their twin."""
    proof = family.proofs[stack]
    inside = len(proof.path) + len(".0")
    prefix = family.blocks(stack)[0].path[:-inside]
    return f"{prefix}{proof.final_norm}" if proof.final_norm else ""


def _scale_of(own: torch.Tensor, seen: torch.Tensor) -> float:
    """What the model multiplies its head's output by: 1 but for models that scale (T5, Cohere)."""
    one, other = own.double(), seen.double()
    ratio = float((one * other).sum() / (other * other).sum())
    return 1.0 if abs(ratio - 1) < 1e-3 else ratio


def _config(model: nn.Module) -> Any:
    """The part of a model's config that is about text."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
