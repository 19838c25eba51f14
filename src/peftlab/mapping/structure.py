"""What a model is made of, by structure alone: lists of blocks, linear layers, vectors, embedding and head.

A block is an element of a `ModuleList` that transformers can checkpoint (`GradientCheckpointingLayer`), or, in models
without that marker, of a list whose elements are alike and hold matrices. A model that peft has wrapped is read as
it stands: an adapted layer counts as the layer it wraps. What a part does is not decided here, but by experiment.

Source: transformers `modeling_layers.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_NUMBER = re.compile(r"\d")


def block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of blocks: innermost of those marked, for a stage of blocks is marked too (Swin); outermost otherwise.

    Args:
        model: Any model.

    Returns:
        Path of the list to its blocks, in the model's order.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    }
    if lists:
        return {
            path: blocks for path, blocks in lists.items() if not any(p.startswith(f"{path}.") for p in lists)
        }
    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and sum(p.dim() > 1 for p in module[0].parameters()) >= 2
    }
    return {
        path: blocks
        for path, blocks in lists.items()
        if not any(path.startswith(f"{outer}.") for outer in lists)
    }


def stack_names(paths: list[str]) -> dict[str, str]:
    """A short name for each block list: layers, encoder, decoder, vision_tower, or its path where these do not tell.

    Args:
        paths: Paths of the lists.

    Returns:
        Path to name: the first component in which the paths differ where that tells them apart.
    """
    if len(paths) == 1:
        return {paths[0]: "layers"}
    components = [path.split(".") for path in paths]
    shared = next(i for i, parts in enumerate(zip(*components, strict=False)) if len(set(parts)) > 1)
    names = {path: parts[shared] for path, parts in zip(paths, components, strict=True)}
    if len(set(names.values())) < len(names) or any(name.isdigit() for name in names.values()):
        return {path: path.replace(".", "_") for path in paths}
    return names


def leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children; a wrapped module counts as one leaf, a shared module comes once.

    Args:
        module: Any module.

    Yields:
        Path in the module and the leaf.
    """
    seen: set[int] = set()

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if id(unwrap(child)) in seen:
                continue
            if unwrap(child) is not child or not any(True for _ in child.children()):
                seen.add(id(unwrap(child)))
                yield path, child
            else:
                if any(True for _ in child.parameters(recurse=False)):
                    yield path, child
                yield from walk(child, f"{path}.")

    yield from walk(module, "")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside peft's wrappers.

    Args:
        module: Any module.

    Returns:
        The base layer of a tuner layer, the original of a `modules_to_save` wrapper, else the module itself.
    """
    for attribute in ("base_layer", "original_module"):
        inner = getattr(module, attribute, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return module


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one weight matrix: Linear or transformers' Conv1D.

    Args:
        module: Any module.
    """
    inner = unwrap(module)
    return isinstance(inner, nn.Linear) or (type(inner).__name__ == "Conv1D" and hasattr(inner, "nf"))


def widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer.

    Args:
        module: A linear layer.
    """
    inner: Any = unwrap(module)
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    return int(inner.nx), int(inner.nf)


def is_vectors_only(module: nn.Module) -> bool:
    """Whether a module without children has only vectors as parameters (LayerNorm, RMSNorm and their like).

    Args:
        module: Any module.
    """
    inner = unwrap(module)
    shapes = [p.dim() for p in inner.parameters()]
    return bool(shapes) and not any(True for _ in inner.children()) and max(shapes) <= 1


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding, unwrapped, or None where the model names none.

    Args:
        model: Any model.
    """
    found = _ask(model, "get_input_embeddings")
    return unwrap(found) if isinstance(found, nn.Module) else None


def output_head(model: nn.Module) -> nn.Module | None:
    """The language-model head, unwrapped, or None.

    Args:
        model: Any model.
    """
    found = _ask(model, "get_output_embeddings")
    return unwrap(found) if isinstance(found, nn.Module) else None


def _ask(model: nn.Module, getter: str) -> Any:
    """What a model's own getter names; None where it has none or the getter says that it does not know."""
    try:
        return getattr(model, getter, lambda: None)()
    except (RuntimeError, AttributeError):
        return None  # transformers' way of saying so (Canine, composite models)


def is_classifier(model: nn.Module, module: nn.Module) -> bool:
    """Whether a linear layer outside the blocks gives the class logits.

    Args:
        model: The model.
        module: The layer.
    """
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return isinstance(module, nn.Linear) and module.out_features == num_labels


def is_tied(model: nn.Module) -> bool:
    """Whether head and input embedding share one tensor.

    Args:
        model: Any model, on the meta device too.
    """
    embedding, head = input_embedding(model), output_head(model)
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    if not all(isinstance(weight, torch.Tensor) for weight in weights):
        return False
    if weights[0] is weights[1]:
        return True
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False)) and weights[0].device.type == "meta"  # type: ignore[union-attr]


def signature(block: nn.Module) -> str:
    """What a block is made of: the paths and classes of its modules, peft's wrappers looked through.

    Args:
        block: A block.

    Returns:
        Sixteen hexadecimal digits; equal for blocks of one make, whatever their sizes and numbers of experts.
    """
    alike = alike_siblings(block)
    found = {
        f"{alike(path)}:{type(unwrap(module)).__name__}"
        for path, module in inner_modules(block, look_through=True)
    }
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()[:16]


def alike_siblings(block: nn.Module) -> Callable[[str], str]:
    """Read the numbered members of a list or dict, where all are of one make, such as experts, as one.

    Args:
        block: A block.

    Returns:
        From a path in the block to the path with "#" for every such member.
    """
    groups = {
        path
        for path, module in inner_modules(block)
        if isinstance(module, nn.ModuleList | nn.ModuleDict)
        and len({_make(member) for name, member in module.named_children() if _NUMBER.search(name)}) == 1
    }

    def alike(path: str) -> str:
        parts = path.split(".")
        return ".".join(
            "#" if _NUMBER.search(part) and ".".join(parts[:i]) in groups else part
            for i, part in enumerate(parts)
        )

    return alike


def _make(module: nn.Module) -> tuple[str, ...]:
    """What a module is made of, by paths and classes."""
    inside = (f"{path}:{type(unwrap(m)).__name__}" for path, m in inner_modules(module))
    return (type(unwrap(module)).__name__, *inside)


def inner_modules(block: nn.Module, *, look_through: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """All modules of a block by path; a wrapped module counts as one, its inside is left out.

    Args:
        block: A block.
        look_through: Whether what a wrapped module holds comes too, by the path that it has without the wrapper.

    Yields:
        Path in the block and module.
    """

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            yield path, child
            if unwrap(child) is child or look_through:
                yield from walk(unwrap(child), f"{path}.")

    yield from walk(block, "")
