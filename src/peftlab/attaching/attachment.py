"""An adapter made by peft, attached to a live base.

All methods that peft implements share this; a leaf in `methods/` makes the peft config and says what is special.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from peftlab.attaching.merging import check_not_over, fold
from peftlab.attaching.occupancy import AllOrNothing, check_free, occupy
from peftlab.attaching.tensors import check_fit, cuda_devices, read_tensors, read_values
from peftlab.attaching.wide_copies import narrow, read_low_rank_rounded, widen_copies
from peftlab.errors import CheckpointError, MethodError, TargetError
from peftlab.family import Selection
from peftlab.files import write_json
from peftlab.mapping import map_model
from peftlab.method import Head, OrdinaryTraining
from peftlab.schedule import Schedule
from peftlab.streams import seed_for

ADAPTER_FILE = "adapter_model.safetensors"
"""peft's name for the file of an adapter's tensors."""
CONFIG_FILE = "adapter_config.json"
"""peft's name for the file of an adapter's settings."""
ADAPTER = "default"
"""The adapter's name inside peft; it appears in parameter names, never in saved files."""

_LIVE: ContextVar[Any] = ContextVar("live", default=None)
"""peft's model of the base that a further adapter is put on."""

TASK_TYPES: dict[Head, str] = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}
"""peft's task type for each kind of head."""


class PeftAttachment(OrdinaryTraining, metaclass=AllOrNothing):
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
        name: The adapter's name inside peft: its scope where it has only a part of the model.
        ended: How it ended: "removed", "merged", or "" while it is on its base.
        beneath: The attachment on the same base that this one stands on.

    Raises:
        TargetError: peft adapted other modules than were selected.
    """

    rewritten: tuple[str, ...] = ()
    ended = ""
    beneath: Any = None

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
        self.name = peft_name(selection.scope)
        self._steps_to_train = steps_to_train
        self._modules_to_save = list(getattr(config, "modules_to_save", None) or ())
        self._required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        live = _LIVE.get()
        if live is None:
            check_free(model, beneath=self.beneath)
        if selection.scope:  # a task type of peft's may copy the head once for each adapter
            config.task_type = None
        self._adapted_before = set() if live is None else set(live.base_model.targeted_module_names)
        with torch.random.fork_rng(devices=cuda_devices(model)), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated"
            )  # peft 0.21 asks
            if tied:  # the warning asks for what is done three lines below
                warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            torch.manual_seed(seed_for(seed, "adapter"))
            self.model: Any = _put_on(model if live is None else live, config, self.name)
        copies = [self.model.base_model.model.get_submodule(path).modules_to_save[self.name] for path in tied]
        for copy in copies[1:]:
            copy.weight = copies[0].weight
        widen_copies(self.model, self.name)
        read_low_rank_rounded(self.model, self.name)
        self._check_targets()
        self.family = map_model(self.model)
        if live is None:
            occupy(model, self)

    def _check_targets(self) -> None:
        """Compare what peft adapted with what was selected.

        Raises:
            TargetError: They differ.
        """
        tuner = self.model.base_model
        adapted = {
            *tuner.targeted_module_names,
            *getattr(tuner, "targeted_parameter_names", ()),
        } - self._adapted_before
        wanted = {site.path for site in self.selection.adapted}
        wanted |= set(getattr(self.config, "target_parameters", None) or ())
        if adapted != wanted:
            raise TargetError(
                f"peft adapted {sorted(adapted - wanted)} beside the targets and left out {sorted(wanted - adapted)}"
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor the adapter can train, by its name in `model`."""
        found = adapter_parameters(self.model)
        others = set(self.model.peft_config) - {self.name}
        return {name: p for name, p in found.items() if not others & set(name.split("."))}

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
        check_not_over(self.ended, "switched off")
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
        check_not_over(self.ended, "saved")
        state = peft.get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=False
        )
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        self.check_fit(tensors)
        active = {name: p.requires_grad for name, p in self.model.named_parameters()}
        peft.set_peft_model_state_dict(self.model, dict(tensors), adapter_name=self.name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(active[name])

    def check_fit(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors of other names or shapes than `load` takes.

        Args:
            tensors: As for `load`.

        Raises:
            CheckpointError: They differ, or the adapter is not on its base any more.
        """
        check_not_over(self.ended, "loaded")
        check_fit(self._own_shapes(), tensors)

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
        folder = self._saved_in(folder)
        self._check_same_kind(folder)
        self.load(read_tensors(folder / ADAPTER_FILE))

    def _check_same_kind(self, folder: Path) -> None:
        """Refuse what another peft config made: equal tensors mean something else with another scale.

        Raises:
            CheckpointError: It is of another type, or scaled otherwise.
        """
        saved, own = read_values(folder / CONFIG_FILE), self.config.to_dict()
        for key in ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora"):
            there, here = saved.get(key), getattr(own.get(key), "value", own.get(key))
            if key in saved and key in own and (there or None) != (here or None):
                raise CheckpointError(
                    f"{folder} was saved with {key} {there}, this adapter has {here}: attach with the settings that it was"
                    " saved with"
                )

    def _saved_in(self, folder: Path) -> Path:
        """Where peft puts this adapter: an adapter with a name of its own has its own folder."""
        return folder if self.name == ADAPTER else folder / self.name

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            folder: Where; peft makes it if needed.
        """
        check_not_over(self.ended, "saved")
        # The embeddings are saved where they are in modules_to_save; peft's own guess would look them up on a hub.
        self.model.save_pretrained(str(folder), selected_adapters=[self.name], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        folder = self._saved_in(folder)
        # peft takes the tied partner out of modules_to_save while it attaches; a loader must be told of both again, or
        # it would put the trained weight into the base's own head (GPT-2's embedding is not named embed_tokens).
        path = folder / CONFIG_FILE
        content = json.loads(path.read_text(encoding="utf-8"))
        saved = [*self._modules_to_save, *(content.get("modules_to_save") or ())]
        write_json(path, content | {"modules_to_save": list(dict.fromkeys(saved)) or None})

    def remove(self) -> nn.Module:
        """Take the adapter off.

        Returns:
            The base as it was given: same object, same tensors, same keys, same `requires_grad`.

        Raises:
            MethodError: It has been merged.
        """
        check_not_over(self.ended, "removed")
        _restore_originals(self.model.base_model.model)  # first: unload would keep the trained copies
        return self._hand_back(self.model.unload())

    def merge(self) -> nn.Module:
        """Fold the adapter into the base's weights and take it off; what was trained whole takes its original's place.

        Returns:
            The base, the same object with the keys and classes it was given with, answering as the adapted model did in
            evaluation mode.

        Raises:
            MethodError: It cannot be merged, or is not on the base any more; nothing has changed.
            NonFiniteError: A merged weight would not be finite; nothing has changed.
        """
        check_not_over(self.ended, "merged")
        base = fold(self.model, str(self.config.peft_type.value).lower())
        narrow(base)
        self.ended = "merged"
        return self._hand_back(base)

    def _hand_back(self, base: nn.Module) -> nn.Module:
        """The base without what peft left on it."""
        self.ended = self.ended or "removed"
        _restore_originals(base)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, True))
        return base


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


def peft_name(scope: str) -> str:
    """What the adapter of a scope is called inside peft, where a name has no dots.

    Args:
        scope: As in `FamilyMap.within`; "" for the whole model.

    Returns:
        The name.
    """
    return scope.replace(".", "_") or ADAPTER


@contextmanager
def beside(live: Any) -> Iterator[None]:
    """A context in which a further adapter of the base is put beside those that it has.

    Args:
        live: peft's model of the base; None where it has no adapters yet.
    """
    token = _LIVE.set(live)
    try:
        yield
    finally:
        _LIVE.reset(token)


def _put_on(model: Any, config: Any, name: str) -> Any:
    """Put an adapter on a base, or beside the adapters that other parts of it have.

    Args:
        model: A base, or peft's model of it.
        config: The peft config.
        name: The adapter's name inside peft.

    Returns:
        peft's model, all adapters switched on.
    """
    try:
        if not isinstance(model, peft.PeftModel):
            return peft.get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
        model.base_model.set_adapter(list(model.peft_config))
    except (AttributeError, ValueError, TypeError) as error:
        kind = str(config.peft_type.value).lower()
        raise MethodError(f"peft cannot put {kind} on this {type(model).__name__}: {error}") from error
    return model
