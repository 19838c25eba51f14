"""AdaLoRA: low-rank adapters in SVD form whose ranks are given where they matter most, by peft.

h = W0 x + (alpha / rank) P Lambda Q x, with Lambda zero at the start. Every step the importance of each singular triplet is
smoothed; the budget of ranks falls along a cubic from `initial_rank` to `target_rank` per module, and the least
important singular values are set to zero. (alpha/2)(||P'P - I|| + ||QQ' - I||) keeps P and Q nearly orthogonal.

Source: Zhang et al. 2023, arXiv 2303.10512, sections 3.1 to 3.3; peft `tuners/adalora/`. That the budget follows the
run's real number of steps, that the allocator is called in every step, and that it goes on after a resume, is done here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.settings import Settings as _Settings

if TYPE_CHECKING:
    from torch import nn

    from peftlab.family import FamilyMap
    from peftlab.method import Attachment, Head

RATE_TO_LORA = 1.0
"""Where a search for its learning rate begins, as a multiple of LoRA's."""

_TAKING = ("target_rank", "warmup_share", "final_share", "interval_steps", "rank_allocation")
"""Settings of how ranks are taken."""


class Settings(_Settings):
    """What can be set on AdaLoRA."""

    initial_rank: int = Field(default=12, ge=1)
    """Rank of every module at the start."""
    target_rank: int = Field(default=8, ge=1)
    """Mean rank of the modules at the end."""
    alpha: float = Field(default=16, gt=0)
    """Scale of the update: alpha / initial_rank."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: str | tuple[str, ...] = "both"
    """What is adapted, as in LoRA."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the run's steps before any rank is taken (the paper's t_i)."""
    final_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of the run's steps at its end in which the ranks stand (the paper's t_f)."""
    interval_steps: int | None = Field(default=None, ge=1)
    """Steps between two allocations (the paper's Delta_T); None is a hundredth of the run, at least one."""
    sensitivity_decay: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of the importance (the paper's beta_1)."""
    uncertainty_decay: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of its uncertainty (the paper's beta_2)."""
    orthogonality: float = Field(default=0.5, ge=0)
    """Weight of the orthogonality term in the loss (the paper's gamma)."""
    rank_allocation: Literal["importance", "magnitude", "uniform"] = "importance"
    """How ranks are ranked: by smoothed sensitivity over all modules, by singular value over all modules, or with the same
    number of ranks in every module, each module's least important taken."""
    adaptive_rank: bool = True
    """Whether ranks are taken at all; without it every module keeps `initial_rank`."""

    @field_validator("targets")
    @classmethod
    def _not_empty(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError("at least one target is needed")
        return targets

    @model_validator(mode="after")
    def _falls(self) -> Settings:
        if not self.adaptive_rank:
            self._check_effect()
            return self
        if self.target_rank > self.initial_rank:
            raise ValueError(
                f"target_rank {self.target_rank} is above initial_rank {self.initial_rank}: ranks are only taken"
            )
        if self.warmup_share + self.final_share >= 1:
            raise ValueError("warmup_share and final_share leave no step in which ranks could be taken")
        return self

    def _check_effect(self) -> None:
        """Refuse settings of how ranks are taken where none are."""
        fields = type(self).model_fields
        unused = [
            name for name in _TAKING if getattr(self, name) not in (fields[name].default, self.initial_rank)
        ]
        if unused:
            raise ValueError(f"{', '.join(unused)}: no effect with adaptive_rank=false, which takes no ranks")


def attach(model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int) -> Attachment:
    """Add AdaLoRA to a base.

    Args:
        model: The base; its own tensors are not changed.
        family: The map of the base.
        settings: Ranks, their schedule, and targets.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds P and Q.

    Returns:
        The attachment; Lambda is zero, so the model still answers as the base does.

    Raises:
        TargetError: The targets match nothing in this model.
    """
    from peftlab.attaching.allocation import AllocatedAttachment

    return AllocatedAttachment(model, family, settings, head=head, seed=seed)
