"""A peft config in the words of a method here, type by type; what a method cannot express is an error that lists it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from peftlab.errors import ConfigError, MethodError, UnknownNameError
from peftlab.family import FamilyMap
from peftlab.importing.fields import Fields
from peftlab.importing.foreign import Translation
from peftlab.importing.places import adapted_modules, modules_beside, name_targets
from peftlab.method import Head

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of LoRA that leave the base as it is: a trained adapter does not depend on them."""
_OF_STARTS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size")
_OF_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a translation starts from.

    Attributes:
        fields: The foreign config.
        tensors: The adapter's tensors by peft's names in files.
        model: The base.
        family: Its map.
        head: What it ends in.
    """

    fields: Fields
    tensors: Mapping[str, torch.Tensor]
    model: nn.Module
    family: FamilyMap
    head: Head


def config_defaults(peft_type: str) -> dict[str, Any]:
    """The fields of this peft's config for a type.

    Args:
        peft_type: The type, in upper or lower case.

    Returns:
        Field to default.

    Raises:
        UnknownNameError: This peft has no such type.
    """
    kinds = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type.lower() not in kinds:
        raise UnknownNameError("peft type", peft_type, kinds)
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(kinds[peft_type.lower()])
    }


def translate(peft_type: str, asked: Asked) -> Translation:
    """A peft config in the words of a method here.

    Args:
        peft_type: The config's type, in lower case.
        asked: The config, the adapter's tensors and the base.

    Returns:
        The translation.

    Raises:
        ConfigError: The config sets what the method cannot express, or a field is of another kind.
        MethodError: The method does not work on this base.
        TargetError: The adapter's modules are not in this base.
    """
    rules: dict[str, Callable[[Asked], Translation]] = {
        "lora": _lora,
        "adalora": _adalora,
        "ia3": _ia3,
        "prompt_tuning": _prompt_tuning,
        "p_tuning": _p_tuning,
        "prefix_tuning": _prefix_tuning,
    }
    if peft_type not in rules:
        return _other(peft_type, asked)
    translation = rules[peft_type](asked)
    asked.fields.check_all_read(translation.method)
    return translation


def _lora(asked: Asked) -> Translation:
    """LoRA with the settings that the method has."""
    fields = asked.fields
    rank, alpha = fields.count("r"), fields.number("lora_alpha")
    if rank < 1 or alpha <= 0:
        raise ConfigError(f"{fields.where}: r is {rank} and lora_alpha {alpha}; both must be above 0")
    _check_start(fields)
    rslora = bool(fields.take("use_rslora", bool))
    experts = bool(fields.take("target_parameters", list))
    paths = adapted_modules(fields, asked.model)
    ranks = _pattern(fields, "rank_pattern", paths, rank)
    alphas = _pattern(fields, "alpha_pattern", paths, alpha)
    settings: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dropout": 0.0 if experts else fields.number("lora_dropout"),
        "targets": name_targets(paths, asked.family, experts=experts),
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "use_rslora": rslora,
        "use_dora": bool(fields.take("use_dora", bool)),
        "bias": fields.take("bias", str) or "none",
        "modules_to_save": modules_beside(fields.values.get("modules_to_save"), asked.model, asked.head),
    }
    fields.pass_over("lora_dropout", *_OF_STARTS)
    scaling = {p: alphas[p] / (math.sqrt(ranks[p]) if rslora else ranks[p]) for p in paths}
    return Translation("lora", settings, asked.tensors, scaling=scaling)


def _check_start(fields: Fields) -> None:
    """Refuse an adapter that belongs to a base which its start has rewritten."""
    start = fields.take("init_lora_weights", bool, str)
    if start is not None and start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{fields.where}: init_lora_weights={start} has taken the adapter's start out of the base, so the file belongs"
            " to a base that nobody else has; save it as a plain LoRA where it was trained:"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _pattern(fields: Fields, name: str, paths: list[str], default: float) -> dict[str, Any]:
    """A value for each module, by peft's own rule."""
    pattern = fields.take(name, dict) or {}
    found = {path: pattern.get(get_pattern_key(list(pattern), path), default) for path in paths}
    wrong = [v for v in found.values() if isinstance(v, bool) or not isinstance(v, int | float) or v <= 0]
    if wrong:
        raise ConfigError(f"{fields.where}: {name} gives {wrong[0]!r}, and must give numbers above 0")
    return found


def _adalora(asked: Asked) -> Translation:
    """AdaLoRA with the ranks that stand; what was planned over the steps of its run is over."""
    fields = asked.fields
    paths = adapted_modules(fields, asked.model)
    _refuse_beside(asked)
    alpha = fields.number("lora_alpha")
    settings: dict[str, Any] = {
        "initial_rank": fields.count("init_r"),
        "target_rank": fields.count("target_r"),
        "alpha": alpha,
        "dropout": fields.number("lora_dropout"),
        "targets": name_targets(paths, asked.family),
        "sensitivity_decay": fields.number("beta1"),
        "uncertainty_decay": fields.number("beta2"),
        "orthogonality": fields.number("orth_reg_weight"),
    }
    kept = fields.take("rank_pattern", dict) or {}
    fields.pass_over("r", "tinit", "tfinal", "deltaT", "total_step", "init_lora_weights", *_OF_STARTS)
    notes = ("the plan of its ranks over the steps is left out: training would go on with a plan of its own",)
    return Translation(
        "adalora",
        settings,
        asked.tensors,
        notes,
        dict.fromkeys(paths, alpha),
        {key.replace(".default", ""): mask for key, mask in kept.items()},
    )


def _ia3(asked: Asked) -> Translation:
    """IA3, whose scaled inputs must be those of mlp.down."""
    fields = asked.fields
    paths = adapted_modules(fields, asked.model)
    _refuse_beside(asked)
    inner = fields.take("feedforward_modules", str, list) or []
    chosen = Fields({**fields.values, "target_modules": inner}, fields.defaults, fields.where)
    at_input = set(adapted_modules(chosen, asked.model)) & set(paths) if inner else set()
    down = {site.path for site in asked.family.sites if site.role == "mlp.down"} & set(paths)
    if at_input != down:
        raise ConfigError(
            f"{fields.where}: feedforward_modules {inner} scales the input of {sorted(at_input)[:3]}, and method ia3 that of"
            f" mlp.down alone: {sorted(down)[:3]}"
        )
    fields.pass_over("init_ia3_weights")
    return Translation("ia3", {"targets": name_targets(paths, asked.family)}, asked.tensors)


def _prompt_tuning(asked: Asked) -> Translation:
    """Prompt tuning of one stack."""
    fields = asked.fields
    _check_prompt(asked)
    fields.pass_over(
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"
    )
    settings = {"num_virtual_tokens": fields.count("num_virtual_tokens")}
    return Translation("prompt_tuning", settings, asked.tensors)


def _p_tuning(asked: Asked) -> Translation:
    """P-tuning as prompt tuning: peft's file holds what the encoder put out, not the encoder."""
    fields = asked.fields
    _check_prompt(asked)
    fields.pass_over(*(name for name in fields.defaults if name.startswith("encoder_")))
    settings = {"num_virtual_tokens": fields.count("num_virtual_tokens")}
    notes = (
        "peft's file holds what P-tuning's encoder put out and not the encoder: the same virtual tokens are kept as prompt"
        " tuning, which answers alike and trains on without an encoder",
    )
    return Translation("prompt_tuning", settings, asked.tensors, notes)


def _prefix_tuning(asked: Asked) -> Translation:
    """Prefix tuning without its MLP, whose output peft's file holds."""
    fields = asked.fields
    if asked.head == "seq2seq":
        raise MethodError(
            "prefix tuning of an encoder-decoder is not imported: peft 0.21 deals its keys and values wrongly over the"
            " layers, so that the adapter would answer otherwise here than where it was trained"
        )
    _check_prompt(asked)
    notes: tuple[str, ...] = ()
    if fields.take("prefix_projection", bool):
        notes = (
            "peft's file holds what the prefix's MLP put out and not the MLP: the prefix is kept without it,"
            " which answers alike",
        )
    fields.pass_over("encoder_hidden_size", "init_weights")
    settings = {"num_virtual_tokens": fields.count("num_virtual_tokens")}
    return Translation("prefix_tuning", settings, asked.tensors, notes)


def _check_prompt(asked: Asked) -> None:
    """Refuse a prompt for two stacks, and modules trained whole beside it."""
    fields = asked.fields
    _refuse_beside(asked)
    fields.take("modules_to_save", list)
    stacks = fields.take("num_transformer_submodules", int)
    if stacks not in (None, 1):
        raise ConfigError(
            f"{fields.where}: num_transformer_submodules={stacks} puts virtual tokens in front of what encoder and decoder"
            " read; here an encoder-decoder reads them in its encoder alone"
        )
    fields.pass_over("token_dim", "num_attention_heads", "num_layers")


def _refuse_beside(asked: Asked) -> None:
    """Refuse modules trained whole beside an adapter of a method that has no setting for them."""
    beside = modules_beside(asked.fields.take("modules_to_save", list), asked.model, asked.head)
    if beside:
        raise ConfigError(
            f"{asked.fields.where}: modules_to_save trains {', '.join(beside)} whole, which only method lora can express"
        )


def _other(peft_type: str, asked: Asked) -> Translation:
    """Any other type, by its own config; the method refuses fields that it cannot take."""
    fields = asked.fields
    settings: dict[str, Any] = {"type": peft_type}
    _refuse_beside(asked)
    placed = {"target_modules"} & fields.defaults.keys()
    if placed and fields.values.get("target_modules") and peft_type not in _OWN_PLACES:
        settings["targets"] = name_targets(adapted_modules(fields, asked.model), asked.family)
    fields.pass_over(*_OF_PLACES, "token_dim", "num_attention_heads", "num_layers")
    settings["config"] = fields.set_fields()
    return Translation("peft", settings, asked.tensors)


_OWN_PLACES = ("adaption_prompt", "ln_tuning", "trainable_tokens")
"""Types that have a place of their own."""
