"""From a live model to its FamilyMap: blocks by structure, roles by place.

A block is an element of a `ModuleList` that transformers can checkpoint (`GradientCheckpointingLayer`), or, in models
without that marker, of a list whose elements are alike and hold linear layers. Inside a block, the child that holds an
attention core is the token mixer; the linear layers elsewhere in the block are its position-wise part. Names decide
only between query, key and value, inside a place already known. A model that peft has wrapped is mapped as it stands:
an adapted layer counts as the layer it wraps.

Source: `inspection.md` section 2.3 of the project's research; transformers `modeling_layers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from peftlab.errors import ModelError
from peftlab.family import FamilyMap, Site

_ATTENTION_MARKS = (
    "is_causal",
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_key_value_groups",
)
_LETTER_ROLES = {"q": "query", "k": "key", "v": "value"}


def map_model(model: nn.Module) -> FamilyMap:
    """Map a model.

    Args:
        model: A transformers model, bare or wrapped by peft, on any device (meta too).

    Returns:
        The map; its paths are those of the given object.

    Raises:
        ModelError: No list of transformer blocks was found.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None) or type(model).__name__
    lists = _block_lists(model)
    if not lists:
        raise ModelError(
            f"no transformer blocks found in this {model_type} model: expected a ModuleList of checkpointable layers"
        )
    names = _stack_names(model, list(lists))
    sites = []
    for path, blocks in lists.items():
        for layer, block in enumerate(blocks):
            sites += _block_sites(block, f"{path}.{layer}", names[path], layer)
    inside = tuple(f"{path}." for path in lists)
    sites += _outer_sites(model, inside)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    sites.sort(key=lambda site: order[site.path])
    return FamilyMap(
        model_type=model_type,
        sites=tuple(sites),
        stacks={names[path]: len(blocks) for path, blocks in lists.items()},
        tied=_is_tied(model),
    )


def _block_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Outermost lists of blocks, by path."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = {
        path: list(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(block, GradientCheckpointingLayer) for block in module)
    }
    if not lists:
        lists = {
            path: list(module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len({type(block) for block in module}) == 1
            and sum(_is_linear(m) for m in module[0].modules()) >= 2
        }
    return {
        path: blocks
        for path, blocks in lists.items()
        if not any(path.startswith(f"{outer}.") for outer in lists)
    }


def _stack_names(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """A short name for each block list: layers, encoder, decoder, or its path where these do not tell."""
    if len(paths) == 1:
        return {paths[0]: "layers"}
    names = {}
    for path in paths:
        parts = [part for part in path.split(".") if part in ("encoder", "decoder")]
        names[path] = parts[-1] if parts else path.replace(".", "_")
    if len(set(names.values())) < len(names):
        return {path: path.replace(".", "_") for path in paths}
    return names


def _block_sites(block: nn.Module, path: str, stack: str, layer: int) -> list[Site]:
    """The sites of one block: token mixers, the position-wise part, norms; and the block itself as a catch-all."""
    mixers = _mixers(block)
    sites = [Site(path, "block", "other", stack, layer)]
    position_wise = []
    for index, (mixer_path, mixer) in enumerate(mixers.items()):
        kind = "attention" if index == 0 else "cross_attention"
        full = f"{path}.{mixer_path}"
        sites.append(Site(full, kind, "attention", stack, layer))
        sites += _mixer_sites(mixer, full, kind, stack, layer)
    for name, module in _leaves(block):
        if any(name == m or name.startswith(f"{m}.") for m in mixers):
            continue
        full = f"{path}.{name}"
        if _is_norm(module):
            sites.append(Site(full, "norm", "other", stack, layer))
        elif _is_linear(module):
            position_wise.append((full, module))
        elif any(True for _ in module.parameters()):
            sites.append(Site(full, "mlp", "mlp", stack, layer))
    return sites + _mlp_sites(position_wise, stack, layer)


def _mixers(block: nn.Module) -> dict[str, nn.Module]:
    """Children of a block that hold an attention core or another token mixer, by path relative to the block.

    A list of sub-layers inside a block (T5) is looked through: its elements count as children.
    """
    children: dict[str, nn.Module] = {}
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            children |= {f"{name}.{i}": element for i, element in enumerate(child)}
        else:
            children[name] = child
    return {name: child for name, child in children.items() if any(_is_core(m) for m in child.modules())}


def _is_core(module: nn.Module) -> bool:
    """Whether a module is an attention core or a convolutional mixer: marked as one, and holding linear layers."""
    marked = any(hasattr(module, mark) for mark in _ATTENTION_MARKS)
    mixing = any(isinstance(child, nn.Conv1d) for child in module.children())
    return (marked or mixing) and any(_is_linear(m) for m in module.modules())


def _mixer_sites(mixer: nn.Module, path: str, kind: str, stack: str, layer: int) -> list[Site]:
    """The sites of one token mixer."""
    sites, linear = [], []
    for name, module in _leaves(mixer):
        full = f"{path}.{name}"
        if _is_norm(module):
            sites.append(Site(full, "norm", "other", stack, layer))
        elif _is_linear(module):
            linear.append((full, module))
    roles = _attention_roles(linear)
    for full, module in linear:
        in_features, out_features = _widths(module)
        role = f"{kind}.{roles[full]}"
        sites.append(Site(full, role, "attention", stack, layer, in_features, out_features, linear=True))
    return sites


def _attention_roles(linear: list[tuple[str, nn.Module]]) -> dict[str, str]:
    """Query, key, value, output, the fused qkv, or "linear" where the place does not tell."""
    letters = {path: _LETTER_ROLES.get(path.rpartition(".")[2].lower()[:1]) for path, _ in linear}
    found = [role for role in letters.values() if role]
    if sorted(found) == ["key", "query", "value"]:
        return {path: role or ("output" if len(linear) == 4 else "linear") for path, role in letters.items()}
    if len(linear) == 2:
        wide = [path for path, module in linear if _widths(module)[1] > _widths(module)[0]]
        if len(wide) == 1:
            return {path: "qkv" if path == wide[0] else "output" for path, _ in linear}
    return dict.fromkeys(letters, "linear")


def _mlp_sites(linear: list[tuple[str, nn.Module]], stack: str, layer: int) -> list[Site]:
    """The linear sites of a block's position-wise part: gate, up, down, the fused gate_up, or "linear"."""
    widths = {path: _widths(module) for path, module in linear}
    paths = list(widths)
    roles = dict.fromkeys(paths, "linear")
    if len(paths) == 2:
        up, down = paths
        roles = {up: "gate_up" if widths[up][1] == 2 * widths[down][0] else "up", down: "down"}
    elif len(paths) == 3 and widths[paths[0]] == widths[paths[1]]:
        roles = dict(zip(paths, ("gate", "up", "down"), strict=True))
    return [
        Site(path, f"mlp.{roles[path]}", "mlp", stack, layer, *widths[path], linear=True) for path in paths
    ]


def _outer_sites(model: nn.Module, inside: tuple[str, ...]) -> list[Site]:
    """The sites outside the blocks: embeddings, head, final norms, poolers."""
    embedding, head = _input_embedding(model), _head(model)
    sites = []
    for path, module in _leaves(model):
        if path.startswith(inside):
            continue
        inner = unwrap(module)
        widths = _widths(module) if _is_linear(module) else (0, 0)
        if inner is embedding:
            sites.append(Site(path, "embedding", "embed"))
        elif isinstance(inner, nn.Embedding):
            sites.append(
                Site(path, "embedding.other", "embed")
            )  # positions, token types, a second stack's tokens
        elif inner is head or (head is None and _is_classifier(model, inner)):
            sites.append(Site(path, "head", "lm_head", "", None, *widths, linear=_is_linear(module)))
        elif _is_norm(module):
            sites.append(Site(path, "norm", "other"))
        elif any(True for _ in module.parameters()):
            sites.append(Site(path, "other", "other", "", None, *widths, linear=_is_linear(module)))
    return sites


def _leaves(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children, by relative path; a wrapped module counts as one leaf. Shared modules come once."""
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


def _is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one weight matrix: Linear or transformers' Conv1D."""
    inner = unwrap(module)
    return isinstance(inner, nn.Linear) or (type(inner).__name__ == "Conv1D" and hasattr(inner, "nf"))


def _widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    inner: Any = unwrap(module)
    if isinstance(inner, nn.Linear):
        return inner.in_features, inner.out_features
    return int(inner.nx), int(inner.nf)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module without children has only vectors as parameters (LayerNorm, RMSNorm and their like)."""
    inner = unwrap(module)
    shapes = [p.dim() for p in inner.parameters()]
    return bool(shapes) and not any(True for _ in inner.children()) and max(shapes) <= 1


def _input_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding, unwrapped, or None where the model names none."""
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if getter else None
    return unwrap(found) if isinstance(found, nn.Module) else None


def _head(model: nn.Module) -> nn.Module | None:
    """The language-model head, unwrapped, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if getter else None
    return unwrap(found) if isinstance(found, nn.Module) else None


def _is_classifier(model: nn.Module, module: nn.Module) -> bool:
    """Whether a linear layer outside the blocks gives the class logits."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return isinstance(module, nn.Linear) and module.out_features == num_labels


def _is_tied(model: nn.Module) -> bool:
    """Whether head and input embedding share one tensor."""
    embedding, head = _input_embedding(model), _head(model)
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    if not all(isinstance(weight, torch.Tensor) for weight in weights):
        return False
    if weights[0] is weights[1]:
        return True
    config = getattr(model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False)) and weights[0].device.type == "meta"  # type: ignore[union-attr]
