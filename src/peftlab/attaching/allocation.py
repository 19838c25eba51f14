"""AdaLoRA on a live base: peft's layers and budget, its allocator called in every step and kept in checkpoints.

peft's `RankAllocator` holds its smoothed importances in plain dicts that no checkpoint has, and its masked ranks in the
config; both are part of `AllocatedAttachment.tensors` here. Ranks that were taken come back to life between two
allocations (their gradient is not zero), as in the paper; from the last allocation on they stay zero. Every allocation is
recorded in a `RankLog`: the effective rank of each module, and the budget.

Source: Zhang et al. 2023, arXiv 2303.10512; peft `tuners/adalora/layer.py`, `RankAllocator`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from peftlab.attaching.attachment import ADAPTER, ADAPTER_FILE, CONFIG_FILE, TASK_TYPES, PeftAttachment
from peftlab.attaching.targeting import is_transposed, target_names, trained_whole
from peftlab.attaching.tensors import read_tensors, read_values
from peftlab.errors import CheckpointError, ScheduleError
from peftlab.family import FamilyMap
from peftlab.files import write_json
from peftlab.method import Head
from peftlab.probe import RunningProbe
from peftlab.rank_log import RankLog, RankPlace, RankRecord
from peftlab.schedule import Schedule

if TYPE_CHECKING:
    from peftlab.methods.adalora import Settings

_SMOOTHED = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_UNKNOWN_STEPS = 1 << 30
"""Steps of a run until `begin` says how many there are."""


class ScoredAllocator(RankAllocator):  # type: ignore[misc]
    """peft's allocator with two other ways to rank singular values.

    Args:
        model: The model that peft made, without peft's wrapper.
        config: The peft config.
        ranking: "importance" (peft's own), "magnitude" or "uniform".

    Attributes:
        has_taken: Whether ranks were taken since it was last set to False.
    """

    def __init__(self, model: nn.Module, config: Any, ranking: str) -> None:
        super().__init__(model, config, ADAPTER)
        self.ranking = ranking
        self.has_taken = False

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set the lowest-ranked singular values to zero.

        Args:
            model: The model that peft made.
            budget: Ranks to keep, over all modules.

        Returns:
            For every Lambda, by name, which of its ranks are kept.
        """
        if budget >= self.init_bgt:  # peft would look for the 0th smallest score
            named = model.named_parameters()
            return {name: [True] * len(p) for name, p in named if f"lora_E.{ADAPTER}" in name}
        self.has_taken = True
        if self.ranking == "importance":
            kept: dict[str, list[bool]] = super().mask_to_budget(model, budget)
            return kept
        scores = {
            name: self._score(model, name)
            for name, _ in model.named_parameters()
            if f"lora_E.{ADAPTER}" in name
        }
        if self.ranking == "uniform":
            share = round(budget / len(scores))
            chosen = {name: _highest(score, share) for name, score in scores.items()}
        else:
            chosen_of_all = _highest(torch.cat(list(scores.values())), budget)
            sizes = [len(score) for score in scores.values()]
            chosen = dict(zip(scores, torch.split(chosen_of_all, sizes), strict=True))
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, keep in chosen.items():
                parameters[name].masked_fill_(~keep.unsqueeze(-1), 0.0)
        return {name: keep.tolist() for name, keep in chosen.items()}

    def _score(self, model: nn.Module, name: str) -> torch.Tensor:
        """The score of each rank of one module, (rank,)."""
        if self.ranking == "magnitude":
            return model.get_parameter(name).detach().abs().view(-1)
        a, b = name.replace("lora_E", "lora_A"), name.replace("lora_E", "lora_B")
        sides = torch.stack([self._element_score(a).mean(dim=1), self._element_score(b).mean(dim=0)]).T
        triplet: torch.Tensor = self._combine_ipt(self._element_score(name), sides)
        return triplet.view(-1)


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which of some scores are among the highest; of equal ones the first."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return keep


class AllocatedAttachment(PeftAttachment):
    """AdaLoRA on a base; satisfies `method.Attachment`.

    Args:
        model: The base.
        family: Its map.
        settings: The method's settings.
        head: What the model ends in.
        seed: Seeds P and Q.

    Raises:
        TargetError: The targets match nothing in this model.
    """

    def __init__(
        self, model: nn.Module, family: FamilyMap, settings: Settings, *, head: Head, seed: int
    ) -> None:
        selection = family.select(settings.targets)
        whole = trained_whole(model, family, selection, head=head, peft_ties=True)
        config = peft.AdaLoraConfig(
            init_r=settings.initial_rank,
            target_r=settings.target_rank,
            total_step=_UNKNOWN_STEPS,
            beta1=settings.sensitivity_decay,
            beta2=settings.uncertainty_decay,
            orth_reg_weight=settings.orthogonality,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_names(family, selection.adapted),
            modules_to_save=list(whole.modules) or None,
            ensure_weight_tying=whole.by_peft,
            task_type=TASK_TYPES[head],
            fan_in_fan_out=is_transposed(model, selection.adapted),
        )
        self._settings = settings
        self._cut: dict[str, Any] = {}
        if settings.orthogonality:
            note = (
                f"the training loss holds the orthogonality term too, {settings.orthogonality:g} times; the validation loss"
                " does not"
            )
            selection = replace(selection, notes=(*selection.notes, note))
        super().__init__(model, config, selection, steps_to_train=_steps_to_train, seed=seed, tied=whole.tied)
        self._tuner: Any = self.model.base_model
        for name, parameter in self._tuner.model.named_parameters():
            if (
                ".ranknum." in name
            ):  # a divisor; peft makes it trainable where it moves it to the base's device or dtype
                parameter.requires_grad_(False)
        self._tuner.rankallocator = ScoredAllocator(self._tuner.model, config, settings.rank_allocation)
        self._last_step = _UNKNOWN_STEPS
        self._record = RankRecord(
            {site.path: RankPlace(site.role, site.stack, site.layer) for site in selection.adapted}
        )

    def begin(self, schedule: Schedule) -> None:
        """Lay the budget over the run's steps.

        Args:
            schedule: What trains when.

        Raises:
            ScheduleError: A phase leaves some of the adapter without gradients, or the run is too short to allocate.
        """
        self._last_step, self._record.log = schedule.total_steps, RankLog(self._record.log.places)
        given = dict.fromkeys(
            self._record.log.places, self._settings.initial_rank
        )  # Lambda itself is still zero
        self._record.log.append(0, sum(given.values()), given)
        if not self._settings.adaptive_rank:
            return
        if len(schedule.phases) > 1:
            raise ScheduleError(
                f"adalora ranks all its modules against each other, and the schedule's {len(schedule.phases)} phases leave"
                " some of them without gradients; train in one phase, use lora under phases, or set"
                " method.adaptive_rank=false"
            )
        steps, settings = schedule.total_steps, self._settings
        first, last = round(steps * settings.warmup_share), round(steps * settings.final_share)
        if steps - first - last < 2:
            raise ScheduleError(
                f"a run of {steps} steps leaves {steps - first - last} in which adalora could take ranks; raise"
                " training.max_steps, or lower method.warmup_share or method.final_share"
            )
        interval = settings.interval_steps or max(1, steps // 100)
        if not any(step % interval == 0 for step in range(first + 1, steps - last + 1)):
            raise ScheduleError(
                f"method.interval_steps {interval} has no step among those in which adalora takes ranks ({first + 1} to"
                f" {steps - last} of {steps}), so that all would be taken at once after them; set it to"
                f" {steps - first - last} or less"
            )
        config = self.config
        config.total_step, config.tinit, config.tfinal = steps, first, last
        config.deltaT = interval

    def after_step(self, step: int) -> None:
        """Smooth the importances, take ranks where it is time, keep taken ones at zero after the last allocation.

        What the ranks have become is recorded whenever some were taken, and at the last step; the first row, at step 0, has
        the ranks that training begins with.

        Args:
            step: The optimizer step just taken, from 1.
        """
        allocator, adaptive = self._tuner.rankallocator, self._settings.adaptive_rank
        allocator.has_taken = False
        if adaptive:
            self._tuner.update_and_allocate(step)
        log = self._record.log
        if allocator.has_taken or step == self._last_step:
            budget = allocator.budget_schedule(step)[0] if adaptive else allocator.init_bgt
            log.append(step, budget, self.ranks())

    def probes(self) -> dict[str, RunningProbe]:
        """What the method records of its own run.

        Returns:
            "ranks": the record of effective ranks.
        """
        return {"ranks": self._record}

    def is_complete(self, step: int) -> bool:
        """Whether the last ranks have been taken.

        Args:
            step: An optimizer step, from 1.

        Returns:
            True from the last allocation on.
        """
        return not self._settings.adaptive_rank or step >= self.config.total_step - self.config.tfinal

    @property
    def answering(self) -> nn.Module:
        """The model without the orthogonality term in its loss."""
        model: nn.Module = self._tuner.model
        return model

    def penalty(self) -> torch.Tensor:
        """The orthogonality term of peft, weighted: what its forward pass adds to a loss, here to one of zero."""
        tuner = self._tuner
        zero = torch.zeros((), device=next(tuner.model.parameters()).device)
        inner = SimpleNamespace(
            forward=lambda: SimpleNamespace(loss=zero), named_parameters=tuner.model.named_parameters
        )
        asked = SimpleNamespace(
            model=inner, peft_config=tuner.peft_config, trainable_adapter_name=tuner.trainable_adapter_name
        )
        added: torch.Tensor = type(tuner).forward(asked).loss
        return added

    def ranks(self) -> dict[str, int]:
        """The effective rank of each module: how many of its singular values are not zero.

        Returns:
            Module path in the base to its rank.
        """
        found = {}
        for name, parameter in self._tuner.model.named_parameters():
            if f".lora_E.{ADAPTER}" in name:
                found[name.partition(".lora_E.")[0]] = int((parameter != 0).sum())
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on: P, Lambda and Q in full, what is trained whole, and the allocator's memory."""
        kept = self.config.rank_pattern
        self.config.rank_pattern = None  # peft would cut the tensors to the ranks that are kept
        try:
            with _pruned_modules():
                found = super().tensors()
        finally:
            self.config.rank_pattern = kept
        for kind in _SMOOTHED:
            for name, values in sorted(getattr(self._tuner.rankallocator, kind).items()):
                found[f"allocator.{kind}.{name}"] = values.detach().to("cpu", copy=True).contiguous()
        for name, mask in sorted((kept or {}).items()):
            found[f"allocator.kept.{name}"] = torch.tensor(mask, dtype=torch.bool).view(-1)
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors and the allocator's memory back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        weights = {name: value for name, value in tensors.items() if not name.startswith("allocator.")}
        memory = {name: value for name, value in tensors.items() if name.startswith("allocator.")}
        self._check_memory(memory)
        allocator = self._tuner.rankallocator
        kept = self.config.rank_pattern
        self.config.rank_pattern = None
        try:
            super().load(weights)
        except CheckpointError:
            self.config.rank_pattern = kept
            raise
        device = next(self.model.parameters()).device
        for kind in _SMOOTHED:
            prefix = f"allocator.{kind}."
            found = {n.removeprefix(prefix): v.to(device) for n, v in memory.items() if n.startswith(prefix)}
            setattr(allocator, kind, found)
        prefix = "allocator.kept."
        masks = {n.removeprefix(prefix): v.tolist() for n, v in memory.items() if n.startswith(prefix)}
        self.config.rank_pattern = masks or None

    def _check_memory(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Refuse an allocator's memory of other tensors than this adapter's."""
        own = {name: tuple(p.shape) for name, p in self._tuner.model.named_parameters()}
        for full, value in memory.items():
            _, kind, name = full.split(".", 2)
            expected = own.get(name)
            if expected is None or tuple(value.shape) != (expected if kind != "kept" else expected[:1]):
                raise CheckpointError(
                    f"the saved adapter does not fit: unexpected {full} {tuple(value.shape)}"
                )

    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is trained, without the allocator's memory."""
        return {
            name: tuple(tensor.shape)
            for name, tensor in self.tensors().items()
            if not name.startswith("allocator.")
        }

    def save(self, folder: Path) -> None:
        """Write the adapter with the ranks that are kept.

        Args:
            folder: Where; peft makes it if needed.
        """
        kept = self.config.rank_pattern
        try:
            with _pruned_modules():
                super().save(folder)
        finally:
            self.config.rank_pattern = kept  # peft renames the pattern's keys on the way
        if self._cut:  # a loaded adapter is cut already; a loader must be told again to which ranks
            path = folder / "adapter_config.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, content | {"rank_pattern": self._cut})

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote: modules are cut to their ranks.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit.
        """
        if self._cut:
            raise CheckpointError(
                f"this adapter was cut to its ranks already; attach it anew to load {folder}"
            )
        pattern = read_values(folder / CONFIG_FILE).get("rank_pattern")
        tensors = read_tensors(folder / ADAPTER_FILE)
        if not pattern:
            super().load(tensors)
            return
        with _pruned_modules():
            self._tuner.resize_modules_by_rank_pattern(pattern, ADAPTER)
        super().load(tensors)
        self._cut = pattern


@contextmanager
def _pruned_modules() -> Iterator[None]:
    """Modules that have lost all their ranks are meant, whatever peft and torch make of empty tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tensor.s. have invalid shape")
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
        yield


def _steps_to_train(name: str) -> int:
    """Law 1's K: P and Q learn from the task only once Lambda, zero at the start, has moved."""
    return 2 if ".lora_A." in name or ".lora_B." in name else 1
