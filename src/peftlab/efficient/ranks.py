"""Taking ranks from AdaLoRA layers while they train: peft's budget and allocator, called step by step.

The mean rank falls along peft's cubic from the layers' rank to `target_rank`; the three rankings are explained in
`attaching/allocation.py`.

Source: Zhang et al. 2023, arXiv 2303.10512, sections 3.2 and 3.3; peft `tuners/adalora/layer.py`, `RankAllocator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from torch import nn
from torch.optim import Optimizer

from peftlab.attaching.allocation import ScoredAllocator
from peftlab.attaching.attachment import ADAPTER
from peftlab.efficient.layers import AdaLoRALayer
from peftlab.efficient.targets import Undo
from peftlab.errors import NotTrainingError, ScheduleError


class RankBudget:
    """The ranks of some AdaLoRA layers over the steps of a training.

    Args:
        layers: Path to layer.
        total_steps: Optimizer steps of the training.
        target_rank: Mean rank at the end; None is two thirds of the layers' rank, the paper's ratio.
        warmup_share: Share of the steps before any rank is taken.
        final_share: Share of the steps at the end in which the ranks stand.
        interval_steps: Steps between two allocations; None is a hundredth of all, at least one.

    Raises:
        ScheduleError: There is no step or no rank to take.
    """

    def __init__(
        self,
        layers: Mapping[str, AdaLoRALayer],
        *,
        total_steps: int,
        target_rank: int | None,
        warmup_share: float,
        final_share: float,
        interval_steps: int | None,
    ) -> None:
        self._paths = list(layers)
        self._layers = nn.ModuleList(layers.values())  # the allocator looks for parameters by their names
        first = next(iter(layers.values()))
        rank = first.r[ADAPTER]
        target = max(1, round(rank * 2 / 3)) if target_rank is None else target_rank
        if not 1 <= target < rank:
            raise ScheduleError(
                f"target_rank {target} leaves no rank to take from layers of rank {rank}; it must be from 1 to {rank - 1}"
            )
        start, last = round(total_steps * warmup_share), round(total_steps * final_share)
        if min(start, last) < 0 or total_steps - start - last < 2:
            raise ScheduleError(
                f"{total_steps} steps with warmup_share {warmup_share} and final_share {final_share} leave"
                f" {total_steps - start - last} in which ranks could be taken; at least 2 are needed"
            )
        self._config: Any = peft.AdaLoraConfig(
            init_r=rank,
            target_r=target,
            total_step=total_steps,
            tinit=start,
            tfinal=last,
            deltaT=interval_steps or max(1, total_steps // 100),
        )
        self._allocator = ScoredAllocator(self._layers, self._config, first.rank_allocation)
        self._stands_from = total_steps - last
        self._kept: dict[str, list[bool]] | None = None
        self.steps = 0
        """Steps counted so far."""

    def step(self, step: int) -> None:
        """Smooth the importances and take ranks where it is time; called when the optimizer has moved.

        Args:
            step: The optimizer step just taken, from 1.

        Raises:
            NotTrainingError: A layer has no gradient.
        """
        if step <= self._stands_from:
            self._check_gradients()
            _, kept = self._allocator.update_and_allocate(
                self._layers, step, force_mask=step == self._stands_from
            )
            self._kept = kept or self._kept
        elif self._kept:
            self._allocator.mask_using_rank_pattern(self._layers, self._kept)
        self.steps = step

    def _check_gradients(self) -> None:
        """The allocator ranks by gradients: without one of them it has nothing to say.

        Raises:
            NotTrainingError: A layer has no gradient.
        """
        dead = [
            path
            for path, layer in zip(self._paths, self._layers, strict=True)
            if layer.lora_E[ADAPTER].grad is None  # type: ignore[index]
        ]
        if dead:
            raise NotTrainingError(
                f"no gradient on {', '.join(dead)}: call update_and_allocate behind optimizer.step() and before"
                " optimizer.zero_grad(), and leave out targets that the forward pass does not reach"
            )

    def follow(self, optimizer: Optimizer) -> Undo:
        """Count the steps of an optimizer, so that nobody has to.

        Args:
            optimizer: The optimizer.

        Returns:
            What to remove when it is over.
        """
        return optimizer.register_step_post_hook(lambda *_: self.step(self.steps + 1))

    def kept(self) -> dict[str, list[bool]]:
        """Which ranks stand, once some have been taken.

        Returns:
            Path to one boolean per rank; empty before the first allocation.
        """
        places = {f"{i}.lora_E.{ADAPTER}": path for i, path in enumerate(self._paths)}
        return {places[name]: list(mask) for name, mask in (self._kept or {}).items()}

    def restore(self, kept: Mapping[str, list[bool]]) -> None:
        """Go on with ranks that were taken before.

        Args:
            kept: As `kept` gave it.
        """
        self._kept = {
            f"{self._paths.index(path)}.lora_E.{ADAPTER}": list(mask) for path, mask in kept.items()
        } or None


def orthogonality_loss(layers: Mapping[str, AdaLoRALayer], weight: float) -> torch.Tensor:
    """What keeps P and Q nearly orthogonal: weight times the mean of ||P'P - I|| and ||QQ' - I|| over all layers.

    Args:
        layers: Path to layer; at least one.
        weight: The paper's gamma.

    Returns:
        A number to add to the loss.
    """
    return weight * torch.stack([layer.orthogonality() for layer in layers.values()]).mean()
