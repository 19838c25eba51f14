"""LoRA by its settings: what peft is told, which of the base's tensors change, and how they come back.

Where B A is not zero at the start, or biases of the base train, tensors of the base change. Their originals are kept on
the CPU: `disabled` exchanges them, `remove` writes them back. How A and B start is in `lora_attachment.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn
from torch.optim import Optimizer

from peftlab.attaching.attachment import TASK_TYPES, PeftAttachment, adapter_parameters
from peftlab.attaching.lora_limits import (
    check_beside_others,
    check_experts,
    check_pattern_of_experts,
    check_start,
)
from peftlab.attaching.lora_start import Start
from peftlab.attaching.optimizing import make_lora_fa, make_lora_plus
from peftlab.attaching.patterns import further_modules, limit_layers, resolve_pattern
from peftlab.attaching.targeting import expert_parameters, is_transposed, lies_in, target_names, trained_whole
from peftlab.attaching.tensors import kept
from peftlab.errors import MethodError, TargetError
from peftlab.family import FamilyMap, Selection
from peftlab.method import Head

if TYPE_CHECKING:
    from peftlab.methods.lora import Settings

_RATIO = 16.0


class LowRankAttachment(PeftAttachment):
    """LoRA by peft, in place, with whatever the start and the biases change in the base; satisfies `method.Attachment`.

    Args:
        model: The base.
        family: The map of the base.
        settings: The method's settings.
        start: How A and B start.
        head: What the model ends in; a classification head is new and is trained whole.
        seed: Seeds A.

    Attributes:
        rewritten: The base's tensors that change: weights with a start that takes B A out of them, biases that train.

    Raises:
        MethodError: A setting has no place in this model.
        TargetError: Targets, layers, patterns or modules match nothing in this model.
    """

    def __init__(
        self,
        model: nn.Module,
        family: FamilyMap,
        settings: Settings,
        start: Start,
        *,
        head: Head,
        seed: int,
    ) -> None:
        self._settings, self._head, self._start = settings, head, start
        selection = limit_layers(family, family.select(settings.targets, experts=True), settings.layers)
        selection = further_modules(model, family, selection, settings.modules_to_save)
        check_experts(selection, settings)
        if selection.scope:
            self._check_beside_others(selection.scope)
        sites = [*selection.adapted, *selection.experts]
        patterns = {
            name: resolve_pattern(family, sites, getattr(settings, name), name=name)
            for name in ("rank_pattern", "alpha_pattern")
        }
        check_pattern_of_experts(selection, patterns)
        ranks = {site.path: settings.rank for site in sites} | patterns["rank_pattern"]
        check_start(model, selection, self._start, {path: int(rank) for path, rank in ranks.items()})
        base_names = {id(p): name for name, p in model.named_parameters()}
        with warnings.catch_warnings():
            # peft advises to attach without data; the rows are looked at before memory is short
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu")
            # its own conversion cannot do patterns with rsLoRA; ours can
            warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")
            super().__init__(
                model,
                *self._configure(model, family, selection, patterns),
                steps_to_train=self._steps,
                seed=seed,
                tied=self._tied,
            )
        self._layers = {
            site.path: self.model.base_model.model.get_submodule(site.path) for site in selection.adapted
        }
        self._check_ranks(ranks)
        self._freeze(base_names)
        weights = [layer.get_base_layer().weight for layer in self._layers.values()]
        changing = {id(p) for p in weights if self._start.rewrites} | {id(p) for p in self._biases().values()}
        live = {base_names[id(p)]: name for name, p in self.model.named_parameters() if id(p) in changing}
        self._live = live
        self._originals = {name: kept(p) for name, p in self._changing().items()}
        self.rewritten = tuple(self._originals)

    def _check_beside_others(self, scope: str) -> None:
        """Refuse what an adapter beside others cannot have for itself.

        Raises:
            MethodError: It is asked for.
        """
        check_beside_others(scope, self._settings, self._start)

    def _configure(
        self, model: nn.Module, family: FamilyMap, selection: Selection, patterns: Mapping[str, Any]
    ) -> tuple[Any, Selection]:
        """The peft config, and the selection."""
        settings = self._settings
        named = tuple(site for site in selection.saved if site.role in ("embedding", "head"))
        tied = Selection(selection.adapted, named, selection.notes, selection.experts)
        whole = trained_whole(model, family, tied, head=self._head, peft_ties=True)
        self._tied = whole.tied
        further = [site.path for site in selection.saved if not lies_in(site.path, whole.modules)]
        modules = [*whole.modules, *further]
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0 if selection.experts else settings.dropout,  # peft adapts 3-D parameters without
            target_modules=target_names(family, selection.adapted),
            target_parameters=expert_parameters(model, selection.experts) or None,
            modules_to_save=list(dict.fromkeys(modules)) or None,
            ensure_weight_tying=whole.by_peft,
            task_type=TASK_TYPES[self._head],
            fan_in_fan_out=is_transposed(model, selection.adapted),
            bias=settings.bias,
            use_dora=settings.use_dora,
            use_rslora=settings.use_rslora,
            rank_pattern=dict(patterns["rank_pattern"]),
            alpha_pattern=dict(patterns["alpha_pattern"]),
            init_lora_weights=self._start.by_peft,
            eva_config=peft.EvaConfig(rho=1.0) if self._start.name == "eva" else None,
        )
        return config, selection

    def _check_ranks(self, ranks: Mapping[str, float]) -> None:
        """Make sure that peft gave each module its own rank, and none of another name's.

        Raises:
            TargetError: It did not.
        """
        wrong = [path for path, layer in self._layers.items() if layer.r[self.name] != ranks[path]]
        if wrong:
            raise TargetError(
                f"rank_pattern: peft gave {wrong[0]} rank {self._layers[wrong[0]].r[self.name]}, not {ranks[wrong[0]]}"
            )
        modules = self.model.base_model.model.named_modules()
        whole = {
            path for path, module in modules if _is_copied(module) and self.name in module.modules_to_save
        }
        wanted = {site.path for site in self.selection.saved} | set(self._modules_to_save)
        if whole - wanted - set(self._tied):
            raise TargetError(
                f"modules_to_save: peft would train {min(whole - wanted)} too, which was not named"
            )

    def _freeze(self, base_names: Mapping[int, str]) -> None:
        """Rest what is not trained, A with LoRA-FA, and find the biases that train.

        Args:
            base_names: The base's own parameters.

        Raises:
            MethodError: Biases shall train, and there are none, or they are not of float32 or wider.
        """
        for name, parameter in self.model.named_parameters():
            if self._is_frozen(name):
                parameter.requires_grad_(False)
        asked = self._settings.bias
        self._bias_names: tuple[str, ...] = ()
        if asked == "none":
            return
        adapter = {id(p) for p in adapter_parameters(self.model).values()}
        only = {id(layer.get_base_layer().bias) for layer in self._layers.values()}
        self._bias_names = tuple(
            name
            for name, p in self.model.named_parameters()
            if name.endswith(".bias")
            and id(p) in base_names.keys() - adapter
            and (asked == "all" or id(p) in only)
            and ".original_module." not in name
        )
        if not self._bias_names:
            raise MethodError(f"bias={asked}: what would train has no biases in this model")
        for name, parameter in self.model.named_parameters():
            if ".original_module." in name:
                parameter.requires_grad_(False)
        narrow = {name: p for name, p in self._biases().items() if p.dtype.itemsize < 4}
        if narrow:
            name, parameter = next(iter(narrow.items()))
            raise MethodError(
                f"bias={asked}: {name} is {str(parameter.dtype).removeprefix('torch.')}, in which small steps round to"
                " nothing; set model.dtype=float32, or bias=none"
            )

    def _biases(self) -> dict[str, nn.Parameter]:
        """The biases of the base that train, by their names in `model`."""
        return {name: self.model.get_parameter(name) for name in self._bias_names}

    def _changing(self) -> dict[str, nn.Parameter]:
        """The base's own tensors that change, by their names in the base."""
        return {name: self.model.get_parameter(live) for name, live in self._live.items()}

    def _steps(self, name: str) -> int:
        """Law 1's K: A learns only once a B that is zero at the start has moved; everything else at once."""
        return 2 if ".lora_A." in name and self._start.b_is_zero else 1

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor that can train, by its name in `model`: LoRA's, what is trained whole, biases."""
        own = {name: p for name, p in super().parameters().items() if not self._is_frozen(name)}
        wanted = own.keys() | set(self._bias_names)
        return {name: p for name, p in self.model.named_parameters() if name in wanted}

    def _is_frozen(self, name: str) -> bool:
        """Whether LoRA-FA rests a tensor."""
        return self._settings.optimizer == "lora_fa" and ".lora_A." in name

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which `model` answers as the base does, with the base's own tensors."""
        changing = self._changing()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            with super().disabled():
                now = {name: p.data for name, p in changing.items()}
                try:
                    for name, parameter in changing.items():
                        parameter.data = self._originals[name].to(parameter.device)
                    yield
                finally:
                    for name, parameter in changing.items():
                        parameter.data = now[name]

    def make_optimizer(
        self, kind: type[Optimizer], options: Mapping[str, Any], *, weight_decay: float
    ) -> Optimizer | None:
        """LoRA+ or LoRA-FA where they are asked for.

        Args:
            kind: The trainer's optimizer class.
            options: Its settings, "lr" among them.
            weight_decay: Weight decay.

        Returns:
            The optimizer; None leaves it to the trainer.
        """
        if self._settings.optimizer == "lora_plus":
            ratio = self._settings.lora_plus_ratio or _RATIO
            return make_lora_plus(self.model, kind, options, ratio=ratio, weight_decay=weight_decay)
        if self._settings.optimizer == "lora_fa":
            scales = {
                f"base_model.model.{path}.{kind}.{self.name}.weight": layer.scaling[self.name]
                for path, layer in self._layers.items()
                for kind in ("lora_A", "lora_B")
            }
            return make_lora_fa(self.model, scales, options, weight_decay=weight_decay)
        return None

    def remove(self) -> nn.Module:
        """Take the adapter off and write the originals back.

        Returns:
            The base as it was given: same object, same tensors, same keys, same `requires_grad`.

        Raises:
            MethodError: It has been merged.
        """
        changing = self._changing()
        base = super().remove()
        with torch.no_grad():
            for name, parameter in changing.items():
                parameter.copy_(self._originals[name])
                parameter.grad = None
        self.rewritten, self._originals, self._live = (), {}, {}
        return base

    def merge(self) -> nn.Module:
        """Fold the adapter into the base's weights and let go of the originals.

        Returns:
            The base, answering as the adapted model did.

        Raises:
            MethodError: It cannot be merged, or is not on the base any more; nothing has changed.
            NonFiniteError: A merged weight would not be finite; nothing has changed.
        """
        base = super().merge()
        self.rewritten, self._originals, self._live = (), {}, {}
        return base


def _is_copied(module: nn.Module) -> bool:
    """Whether peft trains a copy of a module."""
    return isinstance(getattr(module, "original_module", None), nn.Module)
