"""What a model is, in a table: sizes from its config, what was proved of its architecture, and what its parameters take."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from peftlab.attaching.attachment import adapter_parameters
from peftlab.family import FamilyMap
from peftlab.model_facts import decide_family, read_facts

Fact = str | int | float | bool | None


def model_facts(model: nn.Module, config: Any, tokenizer: Any | None, family: FamilyMap) -> dict[str, Fact]:
    """Facts about a model, by name; None where neither config nor proof says.

    Args:
        model: The model, on any device, bare or wrapped by peft.
        config: transformers' config.
        tokenizer: Its tokenizer.
        family: Its map.

    Returns:
        Name to value, in the order of tables.
    """
    text = config.get_text_config()
    kinds = [kind for proof in family.proofs.values() for kind in proof.kinds]
    norms = sorted({kind.norms for kind in kinds} - {"none"})
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    known = read_facts(_core(model), family)
    facts: dict[str, Fact] = {
        "family": decide_family(known).value,
        "model type": family.model_type,
        "class": type(_core(model)).__name__,
        "shape": _shape(config, family),
        **{
            ("layers" if len(family.stacks) == 1 else f"layers of {stack}"): family.num_outputs(stack)
            for stack in family.stacks
        },
        "hidden size": _first(text, "hidden_size", "d_model"),
        "intermediate size": next((s.in_features for s in family.sites if s.role == "mlp.down"), None)
        or _first(text, "intermediate_size", "d_ff", "ffn_dim", "n_inner"),
        "heads": _first(text, "num_attention_heads", "encoder_attention_heads"),
        "key/value heads": _first(text, "num_key_value_heads", "num_attention_heads"),
        "head size": _head_size(text),
        "experts": experts,
        "experts per token": _first(text, "num_experts_per_tok", "top_k") if experts else None,
        "activation": _first(text, "hidden_act", "activation_function", "feed_forward_proj"),
        "norm": " and ".join(norms) or None,
        "causal": _causal(family),
        "positions": _first(text, "max_position_embeddings", "n_positions"),
        "position encoding": _position_encoding(text, family),
        "vocabulary": _first(text, "vocab_size"),
        "embedding and head tied": family.tied,
        "stored as": str(getattr(config, "dtype", None) or "").removeprefix("torch.") or None,
        "tokenizer": None if tokenizer is None else type(tokenizer).__name__,
        "tokens of the tokenizer": None if tokenizer is None else len(tokenizer),
        "special tokens": None if tokenizer is None else _special(tokenizer),
    }
    absent = ("experts", "experts per token", "tokenizer", "tokens of the tokenizer", "special tokens")
    return {name: value for name, value in facts.items() if value is not None or name not in absent}


def parameter_shares(model: nn.Module, family: FamilyMap, *, adapted: bool) -> dict[str, Any]:
    """Where a model's parameters and their bytes are.

    Args:
        model: The model, on any device.
        family: Its map.
        adapted: Whether an adapter is on it, whose parameters are counted apart.

    Returns:
        "rows": stack, layer, group, parameters, bytes and, of the adapter, adapter_parameters and adapter_bytes, summed;
        "total": the same over all; "buffer_bytes"; "dtypes": dtype to parameters. A shared tensor counts once.
    """
    added = set(adapter_parameters(model)) if adapted else set()
    sums: dict[tuple[str, int | None, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    dtypes: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        site = family.locate(name)
        size = parameter.numel() * parameter.element_size()
        row = sums[site.stack, site.layer, site.group]
        place = 2 if name in added else 0
        row[place] += parameter.numel()
        row[place + 1] += size
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    names = ("parameters", "bytes", "adapter_parameters", "adapter_bytes")
    rows = [
        {"stack": stack, "layer": layer, "group": group, **dict(zip(names, row, strict=True))}
        for (stack, layer, group), row in sums.items()
    ]
    return {
        "rows": rows,
        "total": {name: sum(row[name] for row in rows) for name in names},
        "buffer_bytes": sum(b.numel() * b.element_size() for b in model.buffers()),
        "dtypes": dict(dtypes),
    }


def _core(model: Any) -> nn.Module:
    """The transformers model inside peft's wrapper."""
    core: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return core


def _shape(config: Any, family: FamilyMap) -> str:
    """What the stacks are to each other, in words."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder and decoder"
    if len(family.stacks) > 1:
        return f"{len(family.stacks)} towers"
    causal = _causal(family)
    if causal is None:
        return "one stack"
    return "decoder: each token sees those before it" if causal else "encoder: each token sees all others"


def _causal(family: FamilyMap) -> Fact:
    """Whether mixers look back only, as proved: one answer, or one for each stack."""
    found = {
        stack: next((kind.causal for kind in proof.kinds if kind.causal is not None), None)
        for stack, proof in family.proofs.items()
    }
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    words = {True: "yes", False: "no", None: "not proved"}
    return ", ".join(f"{stack} {words[causal]}" for stack, causal in found.items()) or None


def _head_size(config: Any) -> Fact:
    """Width of one head."""
    named: Fact = _first(config, "head_dim", "d_kv")
    if named is not None:
        return named
    hidden, heads = _first(config, "hidden_size", "d_model"), _first(config, "num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _position_encoding(config: Any, family: FamilyMap) -> Fact:
    """How positions are told apart, from what the config and the map hold; None where neither says."""
    if getattr(config, "rope_parameters", None) or getattr(config, "rotary_dim", None):
        return "rotary"
    if getattr(config, "relative_attention_num_buckets", None):
        return "relative, in buckets"
    if any(s.role == "embedding.other" and "pos" in s.path.lower() for s in family.sites):
        return "learnt for each position"
    if getattr(config, "alibi", False):
        return "linear bias (ALiBi)"
    return None


def _first(config: Any, *names: str) -> Any:
    """The first attribute that a config has and that is not None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _special(tokenizer: Any) -> str:
    """The special tokens by name."""
    return ", ".join(f"{name.removesuffix('_token')} {token}" for name, token in _named_tokens(tokenizer))


def _named_tokens(tokenizer: Any) -> list[tuple[str, str]]:
    """The special tokens that have a name, as single tokens."""
    return [
        (name, str(token))
        for name, token in tokenizer.special_tokens_map.items()
        if not isinstance(token, list)
    ]


def dtype_of(model: nn.Module) -> str:
    """The dtype of most parameters, in words.

    Args:
        model: The model.
    """
    counts: dict[torch.dtype, int] = defaultdict(int)
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")
