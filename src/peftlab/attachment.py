"""An adapter made by peft, attached to a live base.

All methods that peft implements share this; a leaf in `methods/` makes the peft config and says what is special.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from peftlab.errors import CheckpointError, TargetError
from peftlab.family import FamilyMap, Selection, Site
from peftlab.files import write_json
from peftlab.mapping import map_model
from peftlab.method import Head
from peftlab.schedule import Schedule
from peftlab.streams import seed_for

ADAPTER_FILE = "adapter_model.safetensors"
"""peft's name for the file of an adapter's tensors."""
ADAPTER = "default"
"""The adapter's name inside peft; it appears in parameter names, never in saved files."""

TASK_TYPES: dict[Head, str] = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}
"""peft's task type for each kind of head."""


class PeftAttachment:
    """A peft adapter on a base; satisfies `method.Attachment`.

    Args:
        model: The base.
        config: The peft config.
        selection: What the targets stood for; checked against what peft adapted.
        steps_to_train: Law 1's K for a parameter name.
        seed: Seeds the adapter's initial values.
        tied: Modules trained whole that share one weight; peft copies each, here they share again.

    Attributes:
        model: The model that peft made.
        config: The peft config.

    Raises:
        TargetError: peft adapted other modules than were selected.
    """

    rewritten: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        selection: Selection,
        *,
        steps_to_train: Callable[[str], int],
        seed: int,
        tied: Sequence[str] = (),
    ) -> None:
        self.selection, self.config = selection, config
        self._steps_to_train = steps_to_train
        self._modules_to_save = list(getattr(config, "modules_to_save", None) or ())
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        with torch.random.fork_rng(devices=_cuda_devices(model)), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated"
            )  # peft 0.21 asks
            if tied:  # the warning asks for what is done three lines below
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            torch.manual_seed(seed_for(seed, "adapter"))
            self.model: Any = peft.get_peft_model(model, config, adapter_name=ADAPTER)
        copies = [self.model.base_model.model.get_submodule(path).modules_to_save[ADAPTER] for path in tied]
        for copy in copies[1:]:
            copy.weight = copies[0].weight
        self._check_targets()
        self.family = map_model(self.model)

    def _check_targets(self) -> None:
        """Compare what peft adapted with what was selected.

        Raises:
            TargetError: They differ.
        """
        tuner = self.model.base_model
        adapted = {*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ())}
        wanted = {site.path for site in self.selection.adapted}
        wanted |= set(getattr(self.config, "target_parameters", None) or ())
        if adapted != wanted:
            raise TargetError(
                f"peft adapted {sorted(adapted - wanted)} beside the targets and left out {sorted(wanted - adapted)}"
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor the adapter can train, by its name in `model`."""
        return adapter_parameters(self.model)

    def steps_to_train(self, name: str) -> int:
        """Law 1's K for one tensor.

        Args:
            name: The tensor's name in `model`.

        Returns:
            Optimizer steps of non-zero learning rate after which it must have trained.
        """
        return self._steps_to_train(name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which `model` answers as the base does; which tensors train is restored afterwards."""
        active = {name: p.requires_grad for name, p in self.model.named_parameters()}
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(active[name])

    def begin(self, schedule: Schedule) -> None:
        """Nothing to prepare for a schedule: a method that plans its steps has more to do."""

    def after_step(self, step: int) -> None:
        """Nothing to do after a step: a method that allocates has more to do."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, by the names of the saved file, on the CPU."""
        state = peft.get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        self._check_fit(tensors)
        active = {name: p.requires_grad for name, p in self.model.named_parameters()}
        peft.set_peft_model_state_dict(self.model, dict(tensors), adapter_name=ADAPTER)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(active[name])

    def _check_fit(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors of other names or shapes than `load` takes."""
        own = self._own_shapes()
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != given:
            missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
            shapes = sorted(name for name in own.keys() & given.keys() if own[name] != given[name])
            raise CheckpointError(
                f"the saved adapter does not fit: missing {missing}, unexpected {extra}, of another shape {shapes}"
            )

    def is_complete(self, step: int) -> bool:
        """Whether the adapter after this step is one to keep.

        Args:
            step: An optimizer step, from 1.

        Returns:
            True: a method that allocates has more to say.
        """
        return True

    @property
    def answering(self) -> nn.Module:
        """The model without anything that the method adds to its loss."""
        model: nn.Module = self.model
        return model

    def _own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that `load` takes."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit.
        """
        self.load(load_file(folder / ADAPTER_FILE))

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            folder: Where; peft makes it if needed.
        """
        # The embeddings are saved where they are in modules_to_save; peft's own guess would look them up on a hub.
        self.model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        # peft takes the tied partner out of modules_to_save while it attaches; a loader must be told of both again, or
        # it would put the trained weight into the base's own head (GPT-2's embedding is not named embed_tokens).
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        saved = [*self._modules_to_save, *(content.get("modules_to_save") or ())]
        write_json(path, content | {"modules_to_save": list(dict.fromkeys(saved)) or None})

    def remove(self) -> nn.Module:
        """Take the adapter off.

        Returns:
            The base as it was given: same object, same tensors, same keys, same `requires_grad`.
        """
        _restore_originals(self.model.base_model.model)  # first: unload would keep the trained copies
        return self._hand_back(self.model.unload())

    def _hand_back(self, base: nn.Module) -> nn.Module:
        """The base without what peft left on it."""
        _restore_originals(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        return base


@dataclass(frozen=True, slots=True)
class TrainedWhole:
    """What is trained whole beside an adapter.

    Attributes:
        modules: Paths for peft's `modules_to_save`: embeddings and head where they are selected, new heads of a classifier.
        by_peft: Whether peft ties an embedding and its head by itself (`ensure_weight_tying`).
        tied: Modules that share one weight and must share it again; for `PeftAttachment`.
    """

    modules: tuple[str, ...]
    by_peft: bool
    tied: tuple[str, ...]


def trained_whole(
    model: nn.Module, family: FamilyMap, selection: Selection, *, head: Head, peft_ties: bool = False
) -> TrainedWhole:
    """What is trained whole beside an adapter.

    Args:
        model: The base.
        family: Its map.
        selection: What the targets stand for.
        head: What the model ends in; a classification head is new and is trained whole.
        peft_ties: Whether the peft config knows `ensure_weight_tying`.

    Returns:
        The modules, and how they are tied.
    """
    saved = [site.path for site in selection.saved]
    aliases = _sharing_modules(model, saved[0]) if saved and family.tied else []
    # peft ties an embedding and its head; where more modules share the weight (T5), PeftAttachment does it.
    by_peft = peft_ties and len(aliases) == 1
    tied = () if by_peft or not aliases else (saved[0], *aliases)
    saved += new_modules(model, head)
    return TrainedWhole(tuple(dict.fromkeys([*saved, *aliases])), by_peft, tied)


def _sharing_modules(model: nn.Module, path: str) -> list[str]:
    """The other modules whose weight is the very tensor of one module: the head, a second stack's embedding."""
    weight = model.get_submodule(path).weight
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if name != path and getattr(module, "weight", None) is weight]


def new_modules(model: nn.Module, head: Head) -> list[str]:
    """What a classification model has beside its pretrained trunk (DistilBERT: two layers); peft knows one of them.

    Args:
        model: The base.
        head: What it ends in.

    Returns:
        Names of modules that are new and must be trained whole; none for models that generate.
    """
    if head != "classification":
        return []
    trunk = getattr(model, "base_model_prefix", "")
    parts = model.named_children()
    return [name for name, part in parts if name != trunk and any(True for _ in part.parameters())]


def target_names(family: FamilyMap, sites: Sequence[Site]) -> list[str]:
    """The shortest names by which peft finds exactly the chosen modules.

    Args:
        family: The map of the base.
        sites: The chosen sites.

    Returns:
        Last path components (`q_proj`) where these match nothing else, else full paths.
    """
    chosen = {site.path for site in sites}
    short = sorted({path.rpartition(".")[2] for path in chosen})
    matched = {site.path for site in family.sites if site.path.rpartition(".")[2] in short}
    return short if matched == chosen else sorted(chosen)


def expert_parameters(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The 3-D parameters of groups of experts, one matrix for each expert; peft's `target_parameters`.

    Args:
        model: The base.
        sites: The groups.

    Returns:
        Full names.
    """
    return [
        f"{site.path}.{name}"
        for site in sites
        for name, parameter in model.get_submodule(site.path).named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def is_transposed(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether the weights of chosen modules are laid out (in, out), as in GPT-2's Conv1D; peft's `fan_in_fan_out`.

    Args:
        model: The base.
        sites: The chosen sites.

    Returns:
        True where one is.
    """
    return any(type(model.get_submodule(site.path)).__name__ == "Conv1D" for site in sites)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that peft's layers added to a model, by name; each shared tensor once.

    Args:
        model: A model that peft has wrapped or injected adapters into; one without adapters gives its trainable tensors.

    Returns:
        Name to parameter, in the model's order.
    """
    owned = set()
    for path, module in model.named_modules():
        for kind in getattr(module, "adapter_layer_names", ()):
            owned.add(f"{path}.{kind}." if path else f"{kind}.")
            owned.add(f"{path}.{kind}" if path else kind)
    if not owned:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}
    prefixes = tuple(prefix for prefix in owned if prefix.endswith("."))
    return {name: p for name, p in model.named_parameters() if name in owned or name.startswith(prefixes)}


def _restore_originals(model: nn.Module) -> None:
    """Put the original module back wherever peft left a `modules_to_save` wrapper."""
    for path, module in list(model.named_modules()):
        original = getattr(module, "original_module", None)
        if isinstance(original, nn.Module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, original)


def _cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices a model lies on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
