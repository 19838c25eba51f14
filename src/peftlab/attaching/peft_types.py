"""Every type of peft by its own config: what a type takes, what it cannot do here, and how it is attached and taken off.

A type that this laboratory cannot carry through is refused before the base is touched; where peft itself fails half-way,
the base is put back as it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from peftlab.attaching.attachment import ADAPTER, TASK_TYPES, PeftAttachment
from peftlab.attaching.occupancy import snapshot
from peftlab.attaching.prompting import PromptAttachment
from peftlab.attaching.targeting import is_transposed, trained_whole
from peftlab.catalog import METHODS
from peftlab.errors import ConfigError, MethodError, PeftlabError, UnknownNameError, did_you_mean
from peftlab.family import FamilyMap, Selection
from peftlab.files import write_json
from peftlab.method import Attachment, Head

_FROM_WEIGHTS = (
    "it is made from the values of the weights, and a pre-flight, which attaches it too, reads none"
)
REFUSED: Mapping[str, str] = {
    "adamss": _FROM_WEIGHTS,
    "cpt": "its loss also counts the prompt's own tokens, and needs to know the kind of every token of a row",
    "frod": _FROM_WEIGHTS,
    "lily": "its router averages over all tokens of a batch, later ones and pads too: an answer depends on its neighbours",
    "multitask_prompt_tuning": "it needs the number of a task with every row, and a run has one task",
    "poly": "it needs the number of a task with every row, and a run has one task",
    "shadow": "it adds a loss of its own, and leaves the last block's update without a gradient",
    "shira": "peft 0.21 lays its mask out on the base's device, which in a pre-flight has none",
    "xlora": "it mixes LoRA adapters that are trained already",
}
"""Types that cannot be carried through, and why."""

_BY_TARGETS = "is set by method.targets"
_BY_PEFTLAB = "is set by peftlab"
NOT_TAKEN: Mapping[str, str] = {
    "target_modules": _BY_TARGETS,
    "exclude_modules": _BY_TARGETS,
    "layers_to_transform": _BY_TARGETS,
    "layers_pattern": _BY_TARGETS,
    "modules_to_save": f"{_BY_TARGETS}: 'all' trains embeddings and head whole, and a new classification head always trains",
    "fan_in_fan_out": "follows from the base's layers",
    "bias": "would change the base's own biases; method bitfit does, and gives them back",
    "save_only_topk_weights": "would leave nothing to go on training with",
    **dict.fromkeys(
        ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"), _BY_PEFTLAB
    ),
    **dict.fromkeys(("inference_mode", "peft_version"), _BY_PEFTLAB),
}
"""Fields of peft's configs that are not taken from a person, and why."""

_WITHOUT_TARGETS = ("adaption_prompt", "ln_tuning", "trainable_tokens")
"""Types that have a place of their own: attention as a whole, norms, the embedding."""
_EXPECTED = (
    "Detected that the base layer has no bias term",  # beft: it cannot be merged
    "Unsupported layer type",  # ln_tuning, of norms other than torch's
    "Failed to load the CUDA extension",  # boft computes without
    "Setting boft_n_butterfly_factor to 1",  # which it is where nothing else is set
)
"""What peft warns of while these types are attached, and the conformance suite shows to be harmless."""

_CHANGED = re.compile(
    r"\badjusted\b|\bignor(?:ed|ing)\b|\bsetting `?\w+`? to\b|\bset to\b|\boverrid", re.IGNORECASE
)
"""How peft tells, in warnings alone, that a setting is not what was asked for."""

_RARE_STEPS = 50
"""Steps after which a trained token must have been in a batch."""
_UNLIKELY = 1e-9
"""The probability with which random skipping may keep a tensor from a gradient for longer than K allows."""


def peft_type_names() -> list[str]:
    """The names of all types that this peft has a config for, in lower case, sorted."""
    return sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def attach_type(
    model: nn.Module,
    family: FamilyMap,
    kind: str,
    *,
    config: Mapping[str, Any],
    targets: str | tuple[str, ...] | None,
    head: Head,
    seed: int,
) -> Attachment:
    """Attach a type of peft.

    Args:
        model: The base.
        family: Its map.
        kind: The type, in upper or lower case.
        config: Values for the fields of its config.
        targets: What is adapted, as in LoRA; None is "both" for types that are put beside linear layers.
        head: What the model ends in.
        seed: Seeds the adapter's initial values.

    Returns:
        The attachment.

    Raises:
        UnknownNameError: peft has no such type.
        ConfigError: The type's config has no such field, or the field is not to be set here.
        MethodError: The type does not work here, or not on this base; the base is as it was.
        TargetError: The targets match nothing in this model.
    """
    name = kind.lower().replace("-", "_")
    if name not in peft_type_names():
        raise UnknownNameError("peft type", kind, peft_type_names())
    if name in METHODS.names():
        raise MethodError(f"peft's type '{name}' is a method of its own here: set method.name={name}")
    if name in REFUSED:
        raise MethodError(f"peft's type '{name}' does not work here: {REFUSED[name]}")
    kind_of_config = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value.lower() == name)
    _check_config(name, kind_of_config, config)
    is_prompt = issubclass(kind_of_config, peft.PromptLearningConfig)
    if targets is not None and (is_prompt or name in _WITHOUT_TARGETS):
        raise MethodError(f"method.targets has no effect on peft's type '{name}': leave it out")
    values, selection, tied = _fields(name, kind_of_config, model, family, targets=targets, head=head)
    with _put_back_on_failure(model, name), _settings_kept(name, kind_of_config, config):
        asked = kind_of_config(**values | dict(config))
        attached: PeftAttachment = (
            TypedPrompt(model, asked, seed=seed)
            if is_prompt
            else TypedAttachment(model, asked, selection, seed=seed, tied=tied)
        )
        _check_taken(name, attached.config, config)
        _check_trainable(name, attached)
    return attached


@contextmanager
def _settings_kept(name: str, kind_of_config: Any, config: Mapping[str, Any]) -> Iterator[None]:
    """A context in which a warning of peft's that it has changed a setting is an error; other warnings come at its end.

    Raises:
        ConfigError: peft has changed one.
    """
    taken = [f.name for f in dataclasses.fields(kind_of_config) if f.init and f.name not in NOT_TAKEN]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        said = str(warning.message)
        named = [key for key in taken if re.search(rf"\b{key}\b", said)]
        expected = any(re.match(message, said) for message in _EXPECTED)
        if named and _CHANGED.search(said) and not (expected and config.get(named[0], 1) == 1):
            raise ConfigError(
                f"method.config.{named[0]} of peft's type '{name}' would not be what is set: {said.splitlines()[0]}"
            )
        if not expected:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _check_taken(name: str, made: Any, config: Mapping[str, Any]) -> None:
    """Refuse what peft has put in a setting's place without a word.

    Raises:
        ConfigError: A field of peft's config is not what was set.
    """
    for key, value in config.items():
        taken = getattr(made, key)
        if _plain(taken) != _plain(value):
            raise ConfigError(
                f"method.config.{key} of peft's type '{name}' is set to {value!r}, and peft makes {taken!r} of it"
            )


def _plain(value: Any) -> Any:
    """A value as a file holds it: no enumerations, and lists for all that is in a row."""
    value = getattr(value, "value", value)
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else value


def _check_trainable(name: str, attachment: PeftAttachment) -> None:
    """Refuse what peft leaves without an adapter, or with one in half precision, whose steps would round to nothing.

    Raises:
        MethodError: It does.
    """
    parameters = attachment.parameters()
    if not parameters:  # osf beside layers other than torch's linear ones
        raise MethodError(
            f"peft's type '{name}' does not work on these layers: it has put nothing beside them"
        )
    for path, parameter in parameters.items():
        copied = f".modules_to_save.{ADAPTER}" in path
        if parameter.dtype.itemsize < 4 and not copied:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise MethodError(
                f"peft's type '{name}' trains in the base's {dtype}, in which small steps round to nothing; set"
                " model.dtype=float32"
            )


def _check_config(name: str, kind_of_config: Any, config: Mapping[str, Any]) -> None:
    """Refuse fields that the type does not have, or that are not to be set here.

    Raises:
        ConfigError: There is one.
    """
    known = [f.name for f in dataclasses.fields(kind_of_config) if f.init and f.name not in NOT_TAKEN]
    for key in config:
        if key in NOT_TAKEN:
            raise ConfigError(f"method.config.{key} {NOT_TAKEN[key]}")
        if key not in known:
            raise ConfigError(
                f"unknown key 'method.config.{key}' of peft's type '{name}'{did_you_mean(key, known)}; there is:"
                f" {', '.join(sorted(known))}"
            )


def _fields(
    name: str,
    kind_of_config: Any,
    model: nn.Module,
    family: FamilyMap,
    *,
    targets: str | tuple[str, ...] | None,
    head: Head,
) -> tuple[dict[str, Any], Selection, tuple[str, ...]]:
    """The fields of a type's config that follow from the base, what is adapted, and which modules share a weight."""
    there = {field.name for field in dataclasses.fields(kind_of_config)}
    selection = Selection(())
    if name == "ln_tuning":
        selection = Selection(tuple(site for site in family.sites if site.role == "norm"))
    elif "target_modules" in there and name not in _WITHOUT_TARGETS:
        selection = family.select("both" if targets is None else targets)
    whole = trained_whole(model, family, selection, head=head, peft_ties="ensure_weight_tying" in there)
    if whole.modules and "modules_to_save" not in there:
        raise MethodError(
            f"peft's type '{name}' trains nothing whole beside it, which {', '.join(whole.modules)} would need"
        )
    values: dict[str, Any] = {
        "task_type": TASK_TYPES[head],
        "modules_to_save": list(whole.modules) or None,
        "ensure_weight_tying": whole.by_peft,
        "fan_in_fan_out": is_transposed(model, selection.adapted),
    }
    if selection.adapted:  # full paths: of norms, a last component alone would match others
        values["target_modules"] = [site.path for site in selection.adapted]
    return {key: value for key, value in values.items() if key in there}, selection, whole.tied


class TypedAttachment(PeftAttachment):
    """An adapter of any type on a base; satisfies `method.Attachment`.

    K is read from the adapter as it starts: a tensor that is all zeros learns at once, since what it is multiplied with is
    not, and the others may stand behind it and learn one step later; where nothing is zero, all learn at once. Where the
    config has an adapter skipped at random, K grows until that explains no tensor without a gradient. Trained tokens
    wait until they are in a batch.

    Args:
        model: The base.
        config: The peft config.
        selection: What is adapted.
        seed: Seeds the adapter's initial values.
        tied: Modules trained whole that share one weight.

    Raises:
        TargetError: peft adapted other modules than were selected.
    """

    def __init__(
        self, model: nn.Module, config: Any, selection: Selection, *, seed: int, tied: tuple[str, ...]
    ) -> None:
        super().__init__(model, config, selection, steps_to_train=lambda _: 1, seed=seed, tied=tied)
        self._trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self._steps_to_train = _steps_by_zeros(self.parameters(), _skipped_steps(config)).__getitem__

    def _check_targets(self) -> None:
        """Compare what peft adapted with what was selected, where something was."""
        if self.selection.adapted:
            super()._check_targets()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every tensor that peft made trainable, by its name in `model`; what a type holds fast is not among them."""
        there = dict(self.model.named_parameters())
        return {name: there[name] for name in self._trained}

    def save(self, folder: Path) -> None:
        """Write what peft writes.

        Args:
            folder: Where; made if needed.
        """
        super().save(folder)
        if not hasattr(self.config, "modules_to_save"):  # a loader would warn of what the type does not have
            path = folder / "adapter_config.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {key: value for key, value in content.items() if key != "modules_to_save"})

    def remove(self) -> nn.Module:
        """Take the adapter off.

        Returns:
            The base as it was given.
        """
        if hasattr(type(self.model.base_model), "unload"):
            return super().remove()
        self.model.base_model.disable_adapter_layers()  # adaption_prompt: the original attention is put back
        return self._hand_back(self.model.base_model.model)


class TypedPrompt(PromptAttachment):
    """Virtual tokens or a trained cache of any type on a base; satisfies `method.Attachment`.

    Args:
        model: The base.
        config: The peft config.
        seed: Seeds the prompt.

    Raises:
        MethodError: The base cannot be given virtual tokens or a cache.
    """

    def __init__(self, model: nn.Module, config: Any, *, seed: int) -> None:
        super().__init__(model, config, seed=seed)
        self._trained = {name for name, p in super().parameters().items() if p.requires_grad}
        self._steps_to_train = _steps_by_zeros(self.parameters(), 0).__getitem__

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prompt's tensors that train, and those of a new head; a cartridge holds its first token fast."""
        return {name: p for name, p in super().parameters().items() if name in self._trained}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on and to answer, what is held fast too, on the CPU."""
        return {
            name.replace(f".{ADAPTER}.", "."): p.detach().to("cpu", copy=True).contiguous()
            for name, p in super().parameters().items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        self.check_fit(tensors)
        with torch.no_grad():
            for name, parameter in super().parameters().items():
                parameter.copy_(tensors[name.replace(f".{ADAPTER}.", ".")])


def _steps_by_zeros(parameters: Mapping[str, nn.Parameter], skipped: int) -> dict[str, int]:
    """Law 1's K for each tensor of an adapter, from which of them are all zeros at the start."""
    # a copy of the base's own has nothing in front of it; without data, each may be zero and each behind a zero
    own = {name: p for name, p in parameters.items() if f".modules_to_save.{ADAPTER}" not in name}
    zero = {name for name, p in own.items() if p.is_meta or not p.detach().any()}
    behind = {name for name, p in own.items() if zero and (p.is_meta or name not in zero)}
    return {name: 1 + skipped + (name in behind) for name in parameters}


def _skipped_steps(config: Any) -> int:
    """Steps for which chance may leave a tensor without a gradient, up to a probability of one in a billion."""
    if hasattr(config, "token_indices"):
        return _RARE_STEPS
    chance = max(getattr(config, "module_dropout", 0.0), getattr(config, "rank_dropout", 0.0))
    return math.ceil(math.log(_UNLIKELY) / math.log(chance)) if 0 < chance < 1 else 0


@contextmanager
def _put_back_on_failure(model: nn.Module, name: str) -> Iterator[None]:
    """Put a model's modules back as they were where attaching a type of peft fails; what peft raises is a MethodError.

    Raises:
        MethodError: peft failed.
    """
    put_back = snapshot(model)
    try:
        yield
    except PeftlabError:
        put_back()
        raise
    except Exception as error:
        put_back()
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MethodError(
            f"peft's type '{name}' does not work on this {type(model).__name__}: {line}"
        ) from error
