"""Which modules a person's targets stand for, how one is put in another's place, and torch's shortcuts past them.

A target is a module's path or the end of one, at a dot: `linear2` is `encoder.layers.0.linear2`, never `linear20`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftlab.errors import MethodError, TargetError, did_you_mean


class Undo(Protocol):
    """Something that was changed and can be changed back."""

    def remove(self) -> None:
        """Change it back."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """An attribute that was changed; satisfies `Undo`.

    Attributes:
        owner: Whose it is.
        name: The attribute.
        before: What it was.
    """

    owner: Any
    name: str
    before: Any

    def remove(self) -> None:
        """Change it back."""
        setattr(self.owner, self.name, self.before)


def find_targets(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """The linear layers that targets stand for.

    Args:
        model: The model.
        targets: Paths, or ends of paths at a dot.

    Returns:
        Path to layer, in the model's order; a layer that a model holds twice is there under each matching path.

    Raises:
        TargetError: A target matches nothing, or something that is no linear layer; says what there is.
        MethodError: A layer is adapted already, or nothing in it is ever called.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise TargetError("no target modules; name at least one, such as 'linear1'")
    modules = dict(_outer_modules(model))
    found, missing = {}, []
    for target in wanted:
        matching = [path for path in modules if f".{path}".endswith(f".{target}")] if target else []
        found.update({path: modules[path] for path in matching})
        missing += [] if matching else [target]
    if missing:
        linear = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
        known = {*linear, *(path.rpartition(".")[2] for path in linear)}
        told = ", ".join(f"'{target}'{did_you_mean(target, known)}" for target in missing)
        raise TargetError(f"nothing here is called {told}; linear layers are: {_few(linear)}")
    for path, module in found.items():
        _check_kind(path, module)
    return {path: module for path, module in modules.items() if path in found}


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below a model by its path, what adapters consist of left out."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or path.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{path}.",)
        yield path, module


def _check_kind(path: str, module: nn.Module) -> None:
    """Refuse a target that cannot be adapted.

    Raises:
        TargetError: It is no linear layer.
        MethodError: It is adapted already, or nothing in it is ever called.
    """
    if isinstance(module, BaseTunerLayer):
        raise MethodError(f"'{path}' is adapted already; take the adapter off with remove(), or leave it out")
    if isinstance(module, nn.MultiheadAttention):
        raise MethodError(
            f"'{path}' is an nn.MultiheadAttention: it reads its in_proj_weight, and no layer of it is ever called;"
            f" its output projection can be adapted, as '{path}.out_proj'"
        )
    if not isinstance(module, nn.Linear | Conv1D):
        inner = [f"{path}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        told = f"; linear layers in it: {_few(inner)}" if inner else ""
        raise TargetError(f"'{path}' is no linear layer but a {type(module).__name__}{told}")


def _few(names: Sequence[str]) -> str:
    """The first names of a list that can be long."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, in place of the one that is there.

    Args:
        model: The model.
        path: The path.
        module: The new module.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def is_read_by_attention(model: nn.Module, path: str) -> bool:
    """Whether a layer is the output projection of an nn.MultiheadAttention, which is read and never called.

    Args:
        model: The model.
        path: The layer's path.

    Returns:
        True where it is.
    """
    parent, _, name = path.rpartition(".")
    return name == "out_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def warn_of_dropout(paths: Sequence[str]) -> None:
    """Say aloud where an adapter's dropout has no place.

    Args:
        paths: Output projections of nn.MultiheadAttention that are adapted with dropout.
    """
    if paths:
        warnings.warn(
            f"no adapter dropout on {_few(paths)}: nn.MultiheadAttention reads the weight of its out_proj, and dropout is on"
            " what a layer is called with; dropout_probability=0 says the same without this warning",
            stacklevel=4,
        )


def leave_shortcuts(model: nn.Module, paths: Sequence[str]) -> list[Undo]:
    """Keep torch's fused encoder layers from reading past modules that must be called.

    In evaluation, nn.TransformerEncoderLayer hands the weights of its parts to one fused function, unless one of them has a
    hook; nn.TransformerEncoder hands nested tensors to its layers, which only that function reads.

    Args:
        model: The model.
        paths: Modules that must be called.

    Returns:
        What was changed.
    """
    undo: list[Undo] = []
    for path in paths:
        ancestors = [model.get_submodule(path[:end]) for end in _ends(path)]
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in ancestors):
            undo.append(model.get_submodule(path).register_forward_pre_hook(_called))
        for module in ancestors:
            if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
                undo.append(Setting(module, "use_nested_tensor", True))
                module.use_nested_tensor = False
    return undo


def _ends(path: str) -> list[int]:
    """Where the paths of a module's ancestors end, the model's own first."""
    return [0] + [i for i, character in enumerate(path) if character == "."]


def _called(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: that there is one keeps the fused function off."""
