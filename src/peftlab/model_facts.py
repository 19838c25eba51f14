"""What a model is, by facts that its config, its structure and its certificate show; its name plays no part.

A family is a short word for a few facts. The first line that holds decides:

| what the model does                                                    | family |
|------------------------------------------------------------------------|--------|
| reads pixels (`pixel_values` is an argument of its forward pass)       | VISION |
| reads no token ids (sound, pixels of text ...)                         | OTHER  |
| has an encoder and a decoder; its norms keep the mean (RMSNorm)        | T5     |
| has an encoder and a decoder; its norms take the mean off (LayerNorm)  | BART   |
| attends, and looks back only; norms keep the mean, or its MLP is gated | LLAMA  |
| attends, and looks back only; its norms take the mean off              | GPT    |
| looks both ways, by attention or otherwise (FNet)                      | BERT   |
| anything else: no attention (Mamba, RWKV), or the facts are not proved | OTHER  |

Where a model looks, what its norms do and whether its MLP is gated is proved by experiment on a tiny twin. A field that a
model was pretrained for (`DOMAIN_SPECIFIC`) is no fact of this kind: see `model_names.DOMAINS`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from peftlab.certificate import BlockKind
from peftlab.errors import ModelError
from peftlab.family import FamilyMap

_QUERIES = ("query", "qkv", "query_key")


class ModelFamily(Enum):
    """Kinds of models, each named after the best known one."""

    GPT = "gpt"
    BERT = "bert"
    T5 = "t5"
    LLAMA = "llama"
    BART = "bart"
    VISION = "vision"
    DOMAIN_SPECIFIC = "domain_specific"
    """Beside another family: a model that was pretrained for one field (CodeBERT, SciBERT, BioBERT)."""
    OTHER = "other"
    """None of these, or not proved to be one."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What decides a family.

    Attributes:
        reads_tokens: Whether its forward pass takes token ids.
        reads_pixels: Whether its forward pass takes pixels.
        is_encoder_decoder: Whether it has an encoder and a decoder.
        is_causal: Whether every token looks back only; None for a model with both kinds of layers, and where no layer
            mixes tokens in a way that was proved.
        has_attention: Whether queries, keys and values were found in any of its layers.
        norm: "layernorm" (takes the mean off), "rmsnorm", "mixed", "none", or "unproven".
        has_gated_mlp: Whether its MLP multiplies two projections of its input.
        has_relative_attention: Whether it learns a bias or an embedding for the distance of two tokens.
        unproven: Why the experiments say nothing about it; "" where they do.
    """

    reads_tokens: bool
    reads_pixels: bool
    is_encoder_decoder: bool
    is_causal: bool | None
    has_attention: bool
    norm: str
    has_gated_mlp: bool
    has_relative_attention: bool
    unproven: str = ""


_DECISIONS: tuple[tuple[ModelFamily, Callable[[ModelFacts], bool]], ...] = (
    (ModelFamily.VISION, lambda facts: facts.reads_pixels),
    (ModelFamily.OTHER, lambda facts: not facts.reads_tokens),
    (ModelFamily.T5, lambda facts: facts.is_encoder_decoder and facts.norm == "rmsnorm"),
    (ModelFamily.BART, lambda facts: facts.is_encoder_decoder and facts.norm == "layernorm"),
    (ModelFamily.OTHER, lambda facts: facts.is_encoder_decoder),
    (ModelFamily.OTHER, lambda facts: facts.is_causal is True and not facts.has_attention),
    (
        ModelFamily.LLAMA,
        lambda facts: facts.is_causal is True and (facts.norm == "rmsnorm" or facts.has_gated_mlp),
    ),
    (ModelFamily.GPT, lambda facts: facts.is_causal is True and facts.norm == "layernorm"),
    (ModelFamily.BERT, lambda facts: facts.is_causal is False),
)
"""The table above, line by line."""


def decide_family(facts: ModelFacts) -> ModelFamily:
    """The family that a model's facts make it.

    Args:
        facts: From `read_facts`.

    Returns:
        The family of the first line of the table that holds.
    """
    return next((family for family, holds in _DECISIONS if holds(facts)), ModelFamily.OTHER)


def model_class(config: Any) -> Any:
    """The class that a checkpoint was saved from, so that loading neither lacks nor drops a tensor.

    Args:
        config: A transformers config.

    Returns:
        The first of the config's `architectures` that transformers has for this config; transformers' base model for it
        where the config names none.

    Raises:
        ModelError: transformers has no model for such a config.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and getattr(found, "config_class", None) is type(config):
            return found
    if type(config) not in MODEL_MAPPING:
        raise ModelError(f"transformers has no model for a config of type {config.model_type}")
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def empty_model(config: Any) -> nn.Module:
    """A model without weights, for its structure.

    Args:
        config: A transformers config.

    Returns:
        The model of `model_class` on the meta device, in evaluation mode.

    Raises:
        ModelError: transformers has no model for such a config.
    """
    with torch.device("meta"):
        model: Any = model_class(config)._from_config(copy.deepcopy(config))
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


def read_facts(model: Any, family: FamilyMap) -> ModelFacts:
    """What a model is.

    Args:
        model: A transformers model on any device.
        family: Its map.

    Returns:
        The facts.
    """
    arguments = _arguments(model)
    kinds = [kind for proof in family.proofs.values() for kind in proof.kinds]
    roles = {role for kind in kinds for role in kind.roles.values()}
    problems = [certificate.problem for certificate in family.certificates if certificate.problem]
    return ModelFacts(
        reads_tokens="input_ids" in arguments,
        reads_pixels="pixel_values" in arguments,
        is_encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),
        is_causal=_one({kind.causal for kind in kinds} - {None}),
        has_attention=any(role.rpartition(".")[2] in _QUERIES for role in roles),
        norm=_norm(model, family, kinds),
        has_gated_mlp=any(role.startswith("mlp.gate") for role in roles),
        has_relative_attention=any(
            "relative" in name or "rel_embeddings" in name for name, _ in model.named_parameters()
        ),
        unproven=problems[0] if problems else "",
    )


def main_stack(model: nn.Module, family: FamilyMap) -> str:
    """The stack that a model is known by: the encoder, the one that sees, or the only one.

    Args:
        model: The mapped model.
        family: Its map.

    Returns:
        A name from the map's stacks.
    """
    if "encoder" in family.stacks:
        return "encoder"
    return stack_reading(model, family, "pixel_values") or next(iter(family.stacks))


def stack_reading(model: nn.Module, family: FamilyMap, argument: str) -> str | None:
    """The stack that reads an argument, in models with one tower for each (CLIP).

    Args:
        model: The mapped model.
        family: Its map.
        argument: "pixel_values" or "input_ids".

    Returns:
        The stack whose reader takes no other kind of input; None where there is none.
    """
    others = {"pixel_values", "input_ids"} - {argument}
    for stack in family.stacks:
        reader = reader_of(model, family, stack, argument)
        if reader is not None and not others & _arguments(model.get_submodule(reader)):
            return stack
    return None


def reader_of(model: nn.Module, family: FamilyMap, stack: str, argument: str) -> str | None:
    """The smallest module around a stack that takes an argument.

    Args:
        model: The mapped model.
        family: Its map.
        stack: A stack of the map.
        argument: The argument.

    Returns:
        Its path, "" for the model itself; None where none takes it.
    """
    path = family.blocks(stack)[0].path
    while path:
        path = path.rpartition(".")[0]
        if argument in _arguments(model.get_submodule(path)):
            return path
    return None


def main_config(config: Any) -> Any:
    """The part of a config that tells the sizes of the main stack.

    Args:
        config: A transformers config.

    Returns:
        That of the vision tower where there is one, else that of the text model, else the config itself.
    """
    seen = getattr(config, "vision_config", None)
    return config.get_text_config() if seen is None else seen


def _arguments(module: nn.Module) -> set[str]:
    """The arguments of a module's forward pass."""
    return set(inspect.signature(module.forward).parameters)


def _one(values: set[Any]) -> Any:
    """The only value; None where there is none or more than one."""
    return next(iter(values)) if len(values) == 1 else None


def _norm(model: nn.Module, family: FamilyMap, kinds: list[BlockKind]) -> str:
    """What the norms do, as proved; where nothing is proved, only torch's own LayerNorm is known to take the mean off."""
    if kinds:
        made = {kind.norms for kind in kinds} - {"none"}
        return _one(made) or ("mixed" if made else "none")
    inside = tuple(f"{block.path}." for block in family.blocks())
    plain = any(isinstance(m, nn.LayerNorm) for path, m in model.named_modules() if path.startswith(inside))
    return "layernorm" if plain else "unproven"
