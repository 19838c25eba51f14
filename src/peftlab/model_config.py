"""What a model is and has, and where its parts are: read from its config, tokenizer and structure, before its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from peftlab.config import ModelSettings, RunConfig, build_config
from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.loading import read_config, read_tokenizer
from peftlab.mapping import map_model
from peftlab.model_facts import (
    ModelFacts,
    ModelFamily,
    decide_family,
    empty_model,
    main_config,
    main_stack,
    read_facts,
)
from peftlab.model_names import ModelName

GIGABYTE = 2**30
"""Bytes of a GB in this interface, as in the document and in what the system's tools show."""


@dataclass(frozen=True, slots=True)
class LayerMapping:
    """Where the parts of a model are; every path resolves with `model.get_submodule`.

    Attributes:
        transformer_layers: The list of blocks that `layer i` counts in (of an encoder-decoder the encoder's).
        attention: The attention modules, in the model's order.
        mlp: The position-wise parts, likewise; where a block holds them loose, their linear layers.
        layer_norm: The norms inside the blocks.
        cross_attention: The attention modules of a decoder that look at the encoder.
        encoder: The encoder's list of blocks; None in models of one side.
        decoder: The decoder's list of blocks; None likewise.
        stacks: Name of every stack to its list of blocks.
    """

    transformer_layers: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    layer_norm: tuple[str, ...]
    cross_attention: tuple[str, ...]
    encoder: str | None
    decoder: str | None
    stacks: Mapping[str, str]

    @classmethod
    def of(cls, family: FamilyMap, main: str, *, stack: str | None = None) -> LayerMapping:
        """Read the paths off a map.

        Args:
            family: The model's map.
            main: The stack that the model is known by.
            stack: Tell the parts of this stack only; None tells all.

        Returns:
            The mapping.
        """
        lists = {name: family.blocks(name)[0].path.rpartition(".")[0] for name in family.stacks}
        inside = [s for s in family.sites if s.layer is not None and stack in (None, s.stack)]
        parts = [s.path for s in inside if s.role == "mlp"]
        held = tuple(f"{path}." for path in parts)
        loose = {s.path for s in inside if (s.linear and s.group == "mlp") or s.role == "mlp.experts"}
        mlp = {*parts, *(path for path in loose if not path.startswith(held))}
        return cls(
            transformer_layers=lists[stack or main],
            attention=tuple(s.path for s in inside if s.role == "attention"),
            mlp=tuple(s.path for s in inside if s.path in mlp),
            layer_norm=tuple(s.path for s in inside if s.role == "norm"),
            cross_attention=tuple(s.path for s in inside if s.role == "cross_attention"),
            encoder=lists.get("encoder"),
            decoder=lists.get("decoder"),
            stacks=lists,
        )


@dataclass(frozen=True)
class ModelConfig:
    """What a model is and has.

    Attributes:
        name: As it was asked for.
        location: What transformers loads: a folder, or a name on the hub.
        family: Its family, by `model_facts.decide_family`.
        architecture: The config's model type.
        class_name: The class that its checkpoint was saved from.
        facts: What decided the family.
        domain: The field it was pretrained for, where that is known; then it also counts as DOMAIN_SPECIFIC.
        num_layers: Blocks of its main stack (of an encoder-decoder the encoder, of CLIP the part that sees).
        num_decoder_layers: Blocks of its decoder; None without one.
        hidden_size: Width of what a block puts out; None where layers differ.
        num_attention_heads: Heads of a layer; None where layers differ.
        max_position_embeddings: As in the config; None where it sets no limit.
        vocab_size: Rows of the token embedding; None for a model that reads no text.
        intermediate_size: Inner width of the MLP; None where it could not be told.
        num_parameters: Parameters, tied ones once.
        memory_requirements_gb: Parameters and buffers in the checkpoint's dtype, in GB of 2**30 bytes. A forward pass or a
            training step needs more: `recommended_batch_size`, `peftlab plan`.
        supports_gradient_checkpointing: Whether its blocks can be computed again in the backward pass.
        supports_mixed_precision: Whether all its weights are floating-point numbers, so that half of their bits can go.
        supports_model_parallel: Whether it says which of its modules must stay on one device, so that the others can be
            spread.
        tokenizer_type: "WordPiece", "BPE", "SentencePiece BPE", "SentencePiece Unigram", "WordLevel"; None without one.
        special_tokens: Name of a special token ("cls_token") to its text.
        layer_mapping: Where its parts are.
        notes: What is missing or not proved, in sentences.

    `min_gpu_memory_gb` and `recommended_batch_size` are predicted when they are first asked for; the first takes seconds,
    the second a prediction for every batch size that is considered.
    """

    name: str
    location: str
    family: ModelFamily
    architecture: str
    class_name: str
    facts: ModelFacts
    domain: str | None
    num_layers: int
    num_decoder_layers: int | None
    hidden_size: int | None
    num_attention_heads: int | None
    max_position_embeddings: int | None
    vocab_size: int | None
    intermediate_size: int | None
    num_parameters: int
    memory_requirements_gb: float
    supports_gradient_checkpointing: bool
    supports_mixed_precision: bool
    supports_model_parallel: bool
    tokenizer_type: str | None
    special_tokens: Mapping[str, str]
    layer_mapping: LayerMapping
    notes: tuple[str, ...] = ()

    @cached_property
    def recommended_batch_size(self) -> int:
        """Rows of 128 tokens in a training step of a LoRA of rank 8 that this machine has the memory for, predicted.

        Raises:
            ModelError: Not even one row fits, or no task trains such a model.
        """
        from peftlab.memory.fitting import choose_batch_size

        return choose_batch_size(_lora_run(self)).batch_size

    @cached_property
    def min_gpu_memory_gb(self) -> float:
        """GB of 2**30 bytes that a CUDA device needs for such a step with one row and checkpointing, predicted.

        Raises:
            ModelError: No task trains such a model.
        """
        from peftlab.memory.budget import find_budget
        from peftlab.memory.prediction import predict_memory

        run = _lora_run(self, device="cuda", gradient_checkpointing=self.supports_gradient_checkpointing)
        budget = find_budget(torch.device("cuda"), memory=1)  # for what CUDA takes beside tensors
        return budget.needed(predict_memory(run).peak_bytes) / GIGABYTE

    @property
    def layers(self) -> int:
        """The document's other name for `num_layers`."""
        return self.num_layers

    @property
    def families(self) -> tuple[ModelFamily, ...]:
        """The family, and DOMAIN_SPECIFIC beside it for a model with a domain."""
        return (self.family, ModelFamily.DOMAIN_SPECIFIC) if self.domain else (self.family,)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return self.facts.is_encoder_decoder

    @property
    def uses_rms_norm(self) -> bool:
        """Whether its norms keep the mean; proved by experiment, see `facts.norm`."""
        return self.facts.norm == "rmsnorm"

    @property
    def has_relative_attention(self) -> bool:
        """Whether it learns a bias or an embedding for the distance of two tokens."""
        return self.facts.has_relative_attention


def describe_model(name: ModelName) -> ModelConfig:
    """What a model is and has.

    Args:
        name: From `resolve_name`.

    Returns:
        Its facts and sizes.

    Raises:
        ModelError: There is no such model; the message says where it was looked for.
    """
    settings = ModelSettings(name=name.given)
    _, config = read_config(settings, name=name)
    model = empty_model(config)
    family = map_model(model)
    facts = read_facts(model, family)
    tokenizer, notes = None, [facts.unproven] if facts.unproven else []
    if facts.reads_tokens:
        try:
            tokenizer = read_tokenizer(settings, name.location)
        except ModelError as error:  # a model can be told about without it, not read texts
            notes.append(str(error))
    main = main_stack(model, family)
    return ModelConfig(
        name=name.given,
        location=name.location,
        family=decide_family(facts),
        architecture=config.model_type,
        class_name=type(model).__name__,
        facts=facts,
        domain=name.domain,
        layer_mapping=LayerMapping.of(family, main),
        tokenizer_type=None if tokenizer is None else tokenizer_kind(tokenizer),
        special_tokens={} if tokenizer is None else _special_tokens(tokenizer),
        notes=tuple(notes),
        **_sizes(config, facts, family, main),
        **_weights(model, config),
    )


def _lora_run(config: ModelConfig, **model: Any) -> RunConfig:
    """A training run of a LoRA on one row of 128 tokens."""
    length = min(128, config.max_position_embeddings or 128)
    return build_config(
        {
            "model": {"name": config.location, **model},
            "method": {"name": "lora", "rank": 8},
            "task": {"max_length": length},
            "training": {"batch_size": 1},
        }
    )


def tokenizer_kind(tokenizer: Any) -> str:
    """How a tokenizer cuts words, read from its own rules.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        "WordPiece", "WordLevel", "BPE" (on bytes or characters), or "SentencePiece BPE" and "SentencePiece Unigram" (which
        keep blanks as a letter); the class name of a slow tokenizer that does not tell.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "SentencePiece" if hasattr(tokenizer, "sp_model") else type(tokenizer).__name__
    rules = json.loads(backend.to_str())
    kind = str(rules["model"]["type"])
    if kind not in ("BPE", "Unigram"):
        return kind
    steps = json.dumps([rules["pre_tokenizer"], rules["normalizer"], rules["decoder"]], ensure_ascii=False)
    pieces = kind == "Unigram" or '"Metaspace"' in steps or "▁" in steps
    return f"SentencePiece {kind}" if pieces else kind


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    """Name to text of a tokenizer's special tokens."""
    return {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }


def _sizes(config: Any, facts: ModelFacts, family: FamilyMap, main: str) -> dict[str, Any]:
    """The sizes of a model: from its structure where that shows them, else from its config."""
    own, text = main_config(config), config.get_text_config()
    down = [s for s in family.sites if s.role == "mlp.down" and s.stack == main]
    return {
        "num_layers": family.num_outputs(main),
        "num_decoder_layers": family.num_outputs("decoder") or None,
        "hidden_size": _number(own, "hidden_size"),
        "num_attention_heads": _number(own, "num_attention_heads"),
        "max_position_embeddings": _number(text, "max_position_embeddings"),
        "vocab_size": _number(text, "vocab_size") if facts.reads_tokens else None,
        "intermediate_size": down[0].in_features if down else _number(own, "intermediate_size"),
    }


def _number(config: Any, name: str) -> int | None:
    """An attribute of a config that is one number; None where it has none or one for each layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one number for what differs from layer to layer
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _weights(model: Any, config: Any) -> dict[str, Any]:
    """Counts and abilities of a model, from its empty form."""
    dtype = getattr(config, "dtype", None) or torch.float32
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    held = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in tensors)
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "memory_requirements_gb": held / GIGABYTE,
        "supports_gradient_checkpointing": bool(model.supports_gradient_checkpointing),
        "supports_mixed_precision": all(p.is_floating_point() for p in model.parameters()),
        "supports_model_parallel": bool(getattr(model, "_no_split_modules", None)),
    }
