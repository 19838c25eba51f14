"""What can be set on an extension, under the document's names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from peftlab.errors import ConfigError, did_you_mean

POSITIONS = ("encoder", "decoder", "both")
"""Where a new layer can be asked to stand."""
_NAMES_NO_FIELD = ("save_path",)


@dataclass
class ExtensionConfig:
    """The settings of all extensions; it can be changed, and every change is checked.

    A field that is set by hand and has no effect in an extension is an error there, so that nobody believes in it.

    Args:
        lora_r: Rank of LoRA's update.
        lora_alpha: Scale of LoRA's update: alpha / rank.
        lora_dropout: Dropout on LoRA's input while training.
        lora_target_modules: What LoRA adapts: module names, roles or target groups; None is every linear layer of attention
            and MLP, whatever a family calls them (T5: q, k, v, o, wi_0, wi_1, wo; not gated: wi, wo).
        layer_position: encoder, decoder or both. Untouched it is the only stack, or the encoder of an encoder-decoder; set
            by hand, a model without such a stack is refused.
        layer_initialization_scale: Untouched, the new layer begins as the identity. Set by hand it begins as a copy of its
            neighbour with the output projections (in a post-norm block: the gate) at this factor, 0 to 1; 0 is the identity.
        freeze_base: Whether the base stays as it is; False gives each model its own copy of it, and trains that too.
        save_directory: Folder in which each task has a folder of its own; None is `adapters` where the program runs.
        save_path: The document's code calls `save_directory` so; both are accepted, together only if equal.

    Raises:
        ConfigError: A value is out of its range; names every such field.

    Example:
        >>> ExtensionConfig(lora_r=8).set_by_hand
        ('lora_r',)
    """

    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_target_modules: str | Sequence[str] | Set[str] | None = None
    layer_position: str = "encoder"
    layer_initialization_scale: float = 0.01
    freeze_base: bool = True
    save_directory: str | Path | None = None
    save_path: InitVar[str | Path | None] = None
    __signature__: ClassVar[inspect.Signature]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        """Note which fields are given by hand.

        Args:
            values: The first fields, by place.
            named: Fields by name.

        Returns:
            A config that `__init__` fills.
        """
        made = super().__new__(cls)
        known = {field.name: field.default for field in fields(cls)}
        given = {name for name, _ in zip(known, values, strict=False)}
        if {*known, "save_path"} <= named.keys():  # dataclasses.replace gives every field, and no person does
            given = {name for name, default in known.items() if named[name] != default}
            named = {}
        vars(made)["_given"] = given | {"save_directory" if name == "save_path" else name for name in named}
        return made

    def __post_init__(self, save_path: str | Path | None) -> None:
        if save_path is not None:
            if self.save_directory not in (None, save_path):
                raise ConfigError(
                    f"save_directory is {str(self.save_directory)!r} and save_path {str(save_path)!r}: they are two names of"
                    " one folder; give one"
                )
            self.save_directory = save_path
        vars(self)["save_path"] = self.save_directory
        problems = [
            problem for field in fields(self) if (problem := _problem(field.name, getattr(self, field.name)))
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        vars(self)["_is_made"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a field; it counts as set by hand from then on.

        Args:
            name: The field.
            value: Its new value.

        Raises:
            ConfigError: There is no such field, or the value is out of its range.
        """
        if vars(self).get("_is_made"):
            known = [field.name for field in fields(self)]
            name = "save_directory" if name == "save_path" else name
            if name not in known:
                raise ConfigError(
                    f"unknown field '{name}'{did_you_mean(name, known)}; there is: {', '.join(known)}"
                )
            if problem := _problem(name, value):
                raise ConfigError(problem)
            vars(self)["_given"].add(name)
            if name == "save_directory":
                vars(self)["save_path"] = value
        super().__setattr__(name, value)

    @property
    def set_by_hand(self) -> tuple[str, ...]:
        """The fields that were given or changed, in their order."""
        return tuple(field.name for field in fields(self) if field.name in vars(self)["_given"])

    @property
    def directory(self) -> Path:
        """The folder in which tasks have their folders."""
        return Path("adapters" if self.save_directory is None else self.save_directory).expanduser()

    @property
    def targets(self) -> str | tuple[str, ...]:
        """What LoRA adapts, as its method takes it."""
        if self.lora_target_modules is None:
            return "both"
        given = self.lora_target_modules
        if isinstance(given, str):
            return given
        return tuple(sorted(given) if isinstance(given, Set) else given)

    def lora_settings(self) -> dict[str, Any]:
        """The settings of the method `lora`."""
        return {
            "rank": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "targets": self.targets,
        }

    def layer_settings(self) -> dict[str, Any]:
        """The settings of the method `new_layer`."""
        given = self.set_by_hand
        found: dict[str, Any] = {"stack": self.layer_position if "layer_position" in given else None}
        if "layer_initialization_scale" in given and self.layer_initialization_scale > 0:
            found |= {"initialization": "scale", "scale": self.layer_initialization_scale}
        return found

    def require_effect(self, without: Iterable[str], *, where: str, why: str) -> None:
        """Refuse fields that were set by hand and have no effect.

        Args:
            without: The fields without effect.
            where: The extension that was given this config.
            why: Why they have none, to end the sentence.

        Raises:
            ConfigError: Such fields were set.
        """
        idle = [name for name in self.set_by_hand if name in set(without)]
        if idle:
            have, them = ("has", "it") if len(idle) == 1 else ("have", "them")
            raise ConfigError(
                f"{', '.join(idle)} {have} no effect in {where}, because {why}; leave {them} out of the config"
            )

    def to_dict(self) -> dict[str, Any]:
        """What was set by hand, as JSON-ready values; what is not there has its default."""
        complete = self.complete()
        return {name: complete[name] for name in self.set_by_hand}

    def complete(self) -> dict[str, Any]:
        """Every field, as JSON-ready values."""
        found: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.lora_target_modules is not None:
            targets = self.targets
            found["lora_target_modules"] = targets if isinstance(targets, str) else list(targets)
        if self.save_directory is not None:
            found["save_directory"] = str(self.save_directory)
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ExtensionConfig:
        """A config from what `to_dict` gave.

        Args:
            values: Field to value.

        Returns:
            The config.

        Raises:
            ConfigError: A field is unknown, or a value out of its range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in (*known, *_NAMES_NO_FIELD)]
        if unknown:
            raise ConfigError("\n".join(f"unknown field '{n}'{did_you_mean(n, known)}" for n in unknown))
        return cls(**values)

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ExtensionConfig:
        """A config from what `to_json` gave.

        Args:
            text: JSON.

        Returns:
            The config.

        Raises:
            ConfigError: It is no JSON object, a field is unknown, or a value out of its range.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"an extension's config must be JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"an extension's config must be a JSON object, not {values!r}")
        return cls.from_dict(values)


# `__new__` takes anything; a person who asks for help shall see the fields
_fields = list(inspect.signature(ExtensionConfig.__init__).parameters.values())[1:]
ExtensionConfig.__signature__ = inspect.Signature(_fields)


def _problem(name: str, value: Any) -> str:
    """What is wrong with one field; "" where nothing is."""
    wanted = _WANTED[name]
    return "" if wanted[1](value) else f"{name} must be {wanted[0]} (given: {value!r})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names_targets(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value != ""
    listed = isinstance(value, Sequence | Set) and not isinstance(value, bytes)
    return listed and bool(value) and all(isinstance(name, str) and name for name in value)


_WANTED: dict[str, tuple[str, Any]] = {
    "lora_r": ("a whole number from 1", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1),
    "lora_alpha": ("a number above 0", lambda v: _is_number(v) and 0 < v < float("inf")),
    "lora_dropout": ("a number from 0, below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "lora_target_modules": ("None, a name, or a list of names that is not empty", _names_targets),
    "layer_position": (f"one of {', '.join(POSITIONS)}", lambda v: v in POSITIONS),
    "layer_initialization_scale": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "freeze_base": ("True or False", lambda v: isinstance(v, bool)),
    "save_directory": (
        "None or a folder",
        lambda v: v is None or (isinstance(v, str | Path) and str(v) != ""),
    ),
}
"""Field to what it must be, in words and as a test."""
