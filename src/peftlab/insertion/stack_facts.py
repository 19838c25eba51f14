"""What must follow when a stack grows by a block, learnt from sketches: empty models on the meta device.

Two sketches of a small config are built, one with a block more. The setting that made one stack longer, and that stack
alone, counts its blocks; whatever else differs in any config inside the model follows it. An attribute of modules that is
the block's index in every block is an index (of the cache). No architecture is known by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.errors import MethodError
from peftlab.mapping.certifying import family_exceptions, layers_needed
from peftlab.mapping.structure import block_lists
from peftlab.mapping.twin import twin_config
from peftlab.mapping.twin_sizes import LAYERS


@dataclass(frozen=True, slots=True)
class StackFacts:
    """What follows the number of blocks of one stack.

    Attributes:
        counts: Place of a config in the model (`configs_of`) to its attributes that count the stack's blocks.
        lists: Place of a config to its attributes that hold one entry for each block (`layer_types`).
        index_names: Attributes of the modules in a block that are the block's index (`layer_idx`).
        only_some: Paths of embeddings that only some of the blocks have: the relative bias that T5's first block computes
            for all.
        decoder_setting: An attribute that the model's config needs for its cache to grow with a decoder; "" where the
            cache follows by itself.
    """

    counts: Mapping[str, tuple[str, ...]]
    lists: Mapping[str, tuple[str, ...]]
    index_names: frozenset[str]
    only_some: frozenset[str]
    decoder_setting: str = ""


def small_config(core: Any) -> Any:
    """A config of the same architecture with small sizes and every make of block.

    Args:
        core: A transformers model, on any device.

    Returns:
        The config of a twin.
    """
    family = family_exceptions(getattr(core.config, "model_type", ""))
    changes = getattr(family, "TWIN", None)
    return twin_config(core.config, num_layers=layers_needed(core), changes=changes)


def configs_of(core: nn.Module) -> dict[str, Any]:
    """Every config object in a model, once, by where it is first found.

    Args:
        core: A transformers model.

    Returns:
        Path of a module, and ":" with the name of an inner config, to the config.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in core.named_modules():
        for place, config in _with_inner(path, vars(module).get("config")):
            if id(config) not in seen:
                seen.add(id(config))
                found[place] = config
    return found


def learn_stack(core: Any, path: str) -> StackFacts:
    """What follows the number of blocks of one stack.

    Args:
        core: A transformers model, on any device.
        path: Path of the list of blocks.

    Returns:
        The facts.

    Raises:
        MethodError: No setting of the model's config makes this stack, and this stack alone, longer.
    """
    small = small_config(core)
    sketch = _sketch(type(core), small)
    lengths = _lengths(sketch) if sketch is not None else {}
    depth = lengths.get(path, 0)
    for place, name in _candidates(small, depth):
        for with_lists in (
            True,
            False,
        ):  # LED's windows are the encoder's, and as many as the decoder has blocks
            raised = _one_more(small, place, name, depth, with_lists=with_lists)
            longer = _sketch(type(core), raised)
            if sketch is not None and longer is not None and _lengths(longer) == lengths | {path: depth + 1}:
                return _compare(sketch, longer, path)
    raise MethodError(
        f"no new block: which setting of {type(core.config).__name__} counts the blocks of {path} could not be found, so"
        " the cache and the rest of the model would not know of it"
    )


def _sketch(model_class: type[nn.Module], config: Any) -> nn.Module | None:
    """An empty model on the meta device; None where the config makes none."""
    build = getattr(model_class, "_from_config", model_class)
    try:
        with torch.device("meta"):
            made: nn.Module = build(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 - a setting tried out may break any model code in any way: then it is not the one
        return None
    return made


def _with_inner(place: str, config: Any) -> Iterator[tuple[str, Any]]:
    """A config and those inside it, with their places."""
    if not (hasattr(config, "to_dict") and hasattr(config, "model_type")):
        return
    yield place, config
    for name, value in vars(config).items():
        yield from _with_inner(f"{place}:{name}", value)


def _lengths(model: nn.Module) -> dict[str, int]:
    return {path: len(blocks) for path, blocks in block_lists(model).items()}


def _candidates(config: Any, depth: int) -> list[tuple[str, str]]:
    """The settings that may count a stack's blocks: whole numbers of that size, those called like layers first."""
    found = [
        (place, name)
        for place, inner in _with_inner("", config)
        for name, value in vars(inner).items()
        if _is_count(value) and value == depth and not name.startswith("_")
    ]
    return sorted(found, key=lambda candidate: candidate[1] not in LAYERS)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_more(config: Any, place: str, name: str, depth: int, *, with_lists: bool) -> Any:
    """A config with one setting raised by one and, if wanted, an entry more in the lists beside it that are as long."""
    raised = copy.deepcopy(config)
    inner = dict(_with_inner("", raised))[place]
    for other, value in list(vars(inner).items()):
        is_list = isinstance(value, list | tuple) and len(value) == depth and not other.endswith("token_id")
        if with_lists and is_list:
            object.__setattr__(inner, other, type(value)([*value, value[-1]]))
    object.__setattr__(inner, name, depth + 1)  # past the config's own checks, which see it half changed
    return raised


def _compare(sketch: nn.Module, longer: nn.Module, path: str) -> StackFacts:
    """What differs between two models of which one has a block more."""
    counts: dict[str, tuple[str, ...]] = {}
    lists: dict[str, tuple[str, ...]] = {}
    after = configs_of(longer)
    for place, config in configs_of(sketch).items():
        pairs = [(name, value, vars(after[place]).get(name)) for name, value in vars(config).items()]
        numbers = [n for n, a, b in pairs if _is_count(a) and _is_count(b) and b == a + 1]
        grown = [
            n for n, a, b in pairs if isinstance(a, list | tuple) and b is not None and len(b) == len(a) + 1
        ]
        counts |= {place: tuple(numbers)} if numbers else {}
        lists |= {place: tuple(grown)} if grown else {}
    blocks = block_lists(longer)[path]
    return StackFacts(
        counts, lists, _index_names(blocks), _only_some(blocks), _decoder_setting(sketch, longer, path)
    )


def _decoder_setting(sketch: Any, longer: Any, path: str) -> str:
    """What tells the cache of an encoder-decoder how deep its decoder is, where the count of blocks does not.

    transformers 5.23 makes T5's cache as deep as the encoder, and its `generate` fails with a deeper decoder; an attribute
    `decoder_layers` is read first (`PreTrainedConfig.get_text_config`).
    """
    if not longer.config.is_encoder_decoder:
        return ""
    stack = longer.get_submodule(path)
    if not any(module is stack for module in longer.get_decoder().modules()):
        return ""
    before, after = (m.config.get_text_config(decoder=True).num_hidden_layers for m in (sketch, longer))
    return "" if after == before + 1 else "decoder_layers"


def _index_names(blocks: list[nn.Module]) -> frozenset[str]:
    """Attributes that are the block's index wherever they stand."""
    found: dict[str, set[tuple[int, int]]] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if _is_count(value):
                    found.setdefault(name, set()).add((index, value))
    return frozenset(
        name
        for name, pairs in found.items()
        if all(index == value for index, value in pairs) and any(index > 0 for index, _ in pairs)
    )


def _only_some(blocks: list[nn.Module]) -> frozenset[str]:
    """Paths of embeddings that some blocks of a class have and others of it have not."""
    paths: dict[type[nn.Module], list[set[str]]] = {}
    for block in blocks:
        inside = {path for path, module in block.named_modules() if isinstance(module, nn.Embedding)}
        paths.setdefault(type(block), []).append(inside)
    found: set[str] = set()
    for first, *others in paths.values():
        for other in others:
            found |= first ^ other
    return frozenset(found)
