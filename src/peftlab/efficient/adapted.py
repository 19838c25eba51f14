"""A model with adapters on it: putting them on, taking ranks, counting, saving, loading, folding in, taking off.

What is put on is remembered as changes that can be undone; a change that fails leaves the model as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from peftlab.attaching.attachment import ADAPTER
from peftlab.attaching.occupancy import check_free, occupy
from peftlab.efficient.embeddings import PrefixTuning, PTuningEmbedding
from peftlab.efficient.layers import AdaLoRALayer, LoRALinear
from peftlab.efficient.ranks import RankBudget, orthogonality_loss
from peftlab.efficient.targets import (
    Undo,
    find_targets,
    is_read_by_attention,
    leave_shortcuts,
    put,
    warn_of_dropout,
)
from peftlab.efficient.weights import (
    adapter_tensors,
    check_fit,
    check_same,
    describe,
    read,
    read_torch_file,
    write,
)
from peftlab.errors import MethodError, NonFiniteError, NotTrainingError, PeftlabError, ScheduleError


@dataclass(frozen=True, slots=True)
class _Placed:
    """A layer in whose place its adapter stands; satisfies `Undo`."""

    model: nn.Module
    path: str
    layer: nn.Module

    def remove(self) -> None:
        """Put the layer back."""
        put(self.model, self.path, self.layer)


class AdaptedModel:
    """A model and what is on it.

    Args:
        model: The model; changed in place, and given back by `remove`.

    Attributes:
        model: The model.
        lora_layers: Path to LoRA layer.
        adalora_layers: Path to AdaLoRA layer.
        ptuning_embeddings: What makes the virtual tokens; None without P-tuning.
        prefix_tuning: The prefix; None without prefix tuning.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._reset()

    def _reset(self) -> None:
        """Nothing is on the model."""
        self.lora_layers: dict[str, LoRALinear] = {}
        self.adalora_layers: dict[str, AdaLoRALayer] = {}
        self.ptuning_embeddings: PTuningEmbedding | None = None
        self.prefix_tuning: PrefixTuning | None = None
        self._required_grad: dict[str, bool] | None = None
        self._undo: list[Undo] = []
        self._budget: RankBudget | None = None
        self._kept: dict[str, list[bool]] = {}

    def begin(
        self,
        total_steps: int,
        *,
        target_rank: int | None = None,
        warmup_share: float = 0.1,
        final_share: float = 0.3,
        interval_steps: int | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Say how long the training is, so that AdaLoRA can lay its budget of ranks over it.

        Args:
            total_steps: Optimizer steps of the whole training.
            target_rank: Mean rank at the end; None is two thirds of `rank`, the paper's ratio.
            warmup_share: Share of the steps before any rank is taken.
            final_share: Share of the steps at the end in which the ranks stand.
            interval_steps: Steps between two allocations; None is a hundredth of all, at least one.
            optimizer: With it, `update_and_allocate` is called after each of its steps by itself.

        Raises:
            MethodError: There is no AdaLoRA on this model.
            ScheduleError: There is no step or no rank to take.
        """
        if not self._takes_ranks():
            return
        self._budget = RankBudget(
            self.adalora_layers,
            total_steps=total_steps,
            target_rank=target_rank,
            warmup_share=warmup_share,
            final_share=final_share,
            interval_steps=interval_steps,
        )
        self._budget.restore(self._kept)
        if optimizer is not None:
            self._undo.append(self._budget.follow(optimizer))

    def update_and_allocate(self, step: int) -> None:
        """Smooth the importance of AdaLoRA's ranks, and take some where it is time; nothing with `adaptive_rank=False`.

        Args:
            step: The optimizer step just taken, from 1; its gradients must still be there.

        Raises:
            MethodError: There is no AdaLoRA on this model.
            ScheduleError: `begin` has not been called.
            NotTrainingError: A layer has no gradient.
        """
        if not self._takes_ranks():
            return
        if self._budget is None:
            raise ScheduleError(
                "how long the training is has not been said: call begin(total_steps=...) first"
            )
        self._budget.step(step)

    def orthogonality_loss(self, weight: float = 0.5) -> torch.Tensor:
        """What to add to the loss to keep AdaLoRA's P and Q nearly orthogonal.

        Args:
            weight: The paper's gamma; the default is peft's.

        Returns:
            weight times the mean of ||P'P - I|| and ||QQ' - I|| over all layers.

        Raises:
            MethodError: There is no AdaLoRA on this model.
        """
        self._takes_ranks()
        return orthogonality_loss(self.adalora_layers, weight)

    def _takes_ranks(self) -> bool:
        """Whether ranks are to be taken.

        Raises:
            MethodError: There is no AdaLoRA on this model.
        """
        if not self.adalora_layers:
            raise MethodError("there is no AdaLoRA on this model: call apply_adalora first")
        return all(layer.adaptive_rank for layer in self.adalora_layers.values())

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer gets: the adapters' tensors that train, each once, layers set by hand among them.

        Returns:
            The parameters, in the model's order.
        """
        return [parameter for parameter in adapter_tensors(self.model).values() if parameter.requires_grad]

    def count_trainable_parameters(self) -> int:
        """How many numbers those are.

        Returns:
            The count; what is shared counts once.
        """
        return sum(parameter.numel() for parameter in self.get_trainable_parameters())

    def check_gradients(self) -> None:
        """Show, behind `loss.backward()`, that gradients reach every adapter and nothing else.

        Raises:
            NotTrainingError: An adapter that trains has none, or something frozen has one; names them.
            NonFiniteError: One is not finite.
        """
        own = {name: p for name, p in adapter_tensors(self.model).items() if p.requires_grad}
        dead = [name for name, parameter in own.items() if parameter.grad is None]
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad and p.grad is not None]
        if dead or frozen:
            raise NotTrainingError(
                f"no gradient reaches {dead}, and gradients are on {frozen}, which is frozen; a target whose weight the"
                " model reads without calling it cannot be adapted"
            )
        wild = [name for name, p in own.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        if wild:
            raise NonFiniteError(f"the gradients of {wild} are not finite")

    def save_efficient_weights(self, path: str | Path) -> None:
        """Write the adapters into one file: safetensors with a manifest, whatever its name ends in.

        Args:
            path: Where.

        Raises:
            MethodError: There are no adapters on this model.
            OutputError: The file cannot be written.
        """
        tensors = adapter_tensors(self.model)
        if not tensors:
            raise MethodError("there is nothing to save: no adapter is on this model")
        if (
            self._budget is None
            and not self._kept
            and any(x.adaptive_rank for x in self.adalora_layers.values())
        ):
            warnings.warn(
                "AdaLoRA was applied with adaptive_rank=True, and no rank was ever taken: begin and update_and_allocate were"
                " not called",
                stacklevel=2,
            )
        kept = self._budget.kept() if self._budget is not None else self._kept
        write(Path(path), tensors, describe(self.model, kept))

    def load_efficient_weights(
        self, path: str | Path, *, torch_file: bool = False, any_base: bool = False
    ) -> None:
        """Put saved adapters into those that are on the model now; all of the file, or nothing.

        Args:
            path: The file.
            torch_file: Read a file of torch's own format: named tensors and nothing else; it has no manifest to check.
            any_base: Take it although it was trained on a base with other parameters.

        Raises:
            CheckpointError: It is damaged, does not fit (lists what), or was trained on another base.
        """
        source, own = Path(path), adapter_tensors(self.model)
        given, manifest = (read_torch_file(source), None) if torch_file else read(source)
        check_fit(own, given, source)
        if manifest is not None:
            check_same(describe(self.model, {}), manifest, source, any_base=any_base)
            self._kept = manifest.kept
            if self._budget is not None:
                self._budget.restore(self._kept)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(given[name])

    def merge(self) -> nn.Module:
        """Fold LoRA and AdaLoRA into the weights they are beside, and take the adapters off.

        Returns:
            The model, with the outputs it had in evaluation mode.

        Raises:
            MethodError: There is nothing to fold, something that cannot be, or a weight that another module uses too.
            NonFiniteError: An update is not finite.
        """
        if self.ptuning_embeddings is not None or self.prefix_tuning is not None:
            raise MethodError("virtual tokens and prefixes are no weights: they cannot be merged")
        layers: dict[str, Any] = {**self.lora_layers, **self.adalora_layers}
        if not layers:
            raise MethodError("there is nothing to merge: no LoRA or AdaLoRA is on this model")
        _check_can_be_folded(self.model, layers)
        for layer in {id(layer): layer for layer in layers.values()}.values():
            layer.merge()
        return self.remove()

    def remove(self) -> nn.Module:
        """Take every adapter off that was put on.

        Returns:
            The model: its modules, tensors and `requires_grad` as they were before.
        """
        for change in reversed(self._undo):
            change.remove()
        for name in ("ptuning_embeddings", "prefix_tuning"):
            if getattr(self, name) is not None:
                delattr(self.model, name)
        self._restore_grad()
        self._reset()
        return self.model

    def _refuse_again(self, call: str, there: object) -> None:
        """Refuse a method that is on the model already."""
        if there:
            raise MethodError(f"{call} has been called already; call remove() first to begin anew")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the model, freeze what is no adapter; where it fails, leave everything as it was."""
        if first := self._required_grad is None:
            check_free(self.model)
            self._required_grad = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            yield
        except PeftlabError:
            if first:
                self._restore_grad()
                self._required_grad = None
            raise
        if first:
            occupy(self.model, self)
        own = {id(parameter) for parameter in adapter_tensors(self.model).values()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)

    @property
    def ended(self) -> str:
        """Whether its adapters are off the model: "" while they are on it."""
        return "" if self._required_grad is not None else "removed"

    def _restore_grad(self) -> None:
        """Let train again what trained before."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_((self._required_grad or {}).get(name, parameter.requires_grad))

    def _place(
        self, targets: Sequence[str], make: Callable[[nn.Module, bool], Any], *, dropout: bool
    ) -> dict[str, Any]:
        """Put adapters beside the layers that targets stand for; none at all where one cannot be made.

        Args:
            targets: The targets.
            make: Gives the adapter of a layer, told whether attention reads the layer and never calls it.
            dropout: Whether the adapters have dropout.

        Returns:
            Path to adapter.
        """
        found = find_targets(self.model, targets)
        read_only = [path for path in found if is_read_by_attention(self.model, path)]
        made: dict[int, Any] = {}
        with self._changing():
            for path, layer in found.items():
                if id(layer) not in made:
                    made[id(layer)] = make(layer, path in read_only)
            for path, layer in found.items():
                put(self.model, path, made[id(layer)])
                self._undo.append(_Placed(self.model, path, layer))
            self._undo += leave_shortcuts(self.model, list(found))
        if dropout:
            warn_of_dropout(read_only)
        return {path: made[id(layer)] for path, layer in found.items()}

    def _keep(self, name: str, made: nn.Module, wire: Callable[[], list[Undo]]) -> None:
        """Make a part of the model of something, so that it moves, trains and is counted with it.

        Args:
            name: Its name, here and in the model.
            made: What it is.
            wire: Lets the model use it.

        Raises:
            MethodError: The model has something of that name.
        """
        if hasattr(self.model, name):
            raise MethodError(
                f"{type(self.model).__name__} has a '{name}' of its own, in the place of the adapter's"
            )
        first = next((p for p in self.model.parameters() if p.is_floating_point()), torch.empty(0))
        made.to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32)
        made.train(self.model.training)
        with self._changing():
            self.model.add_module(name, made)
            try:
                self._undo += wire()
            except PeftlabError:
                delattr(self.model, name)
                raise
        setattr(self, name, made)


def _check_can_be_folded(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Refuse to fold what would change more than it should, or could not be folded in whole.

    Raises:
        MethodError: A weight belongs to another module too, or there is no bias to fold a bias into.
        NonFiniteError: An update is not finite.
    """
    for path, layer in layers.items():
        base = layer.get_base_layer()
        users = [name for name, m in model.named_modules() if m._parameters.get("weight") is base.weight]
        if len(users) > 1:
            raise MethodError(
                f"the weight of '{path}' is used elsewhere too ({', '.join(users)}): it cannot be merged"
            )
        if getattr(layer, "lora_bias", {}).get(ADAPTER) and base.bias is None:
            raise MethodError(f"'{path}' has no bias that the bias of its LoRA could be merged into")
        if not bool(torch.isfinite(layer.get_delta_weight(ADAPTER)).all()):
            raise NonFiniteError(f"the update of '{path}' is not finite: it cannot be merged")
