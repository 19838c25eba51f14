"""A state dict of loralib, Microsoft's own LoRA library: `PATH.lora_A`, `PATH.lora_B`, and what was trained whole.

loralib's `MergedLinear` adapts some of the parts of a fused layer (GPT-2's c_attn: queries, keys and values), each with its
own A and B. Side by side, with zeros where a part's B does not reach, these are one LoRA of the sum of their ranks:
delta W = (alpha / r) B A, exactly.

Source: Hu et al. 2021, arXiv 2106.09685; github.com/microsoft/LoRA, loralib/layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.attaching.targeting import new_modules
from peftlab.errors import CheckpointError, ConfigError, InputError
from peftlab.family import FamilyMap, Site
from peftlab.importing.fit import nearest
from peftlab.importing.foreign import PREFIX, Foreign, Translation
from peftlab.importing.places import name_targets

_A, _B = ".lora_A", ".lora_B"
_PARTS = ("query", "key", "value")
_SHOWN = 5


def is_loralib(names: Sequence[str]) -> bool:
    """Whether names of tensors are those of a loralib state dict.

    Args:
        names: The names.

    Returns:
        True where there are A and B without a name behind them.
    """
    return any(name.endswith(_A) for name in names) and any(name.endswith(_B) for name in names)


def read_loralib(
    path: Path, tensors: Mapping[str, torch.Tensor], *, alpha: float | None, merged: Sequence[str]
) -> Foreign:
    """Read a loralib state dict.

    Args:
        path: The file, for messages.
        tensors: What it holds.
        alpha: loralib's lora_alpha, which the file does not hold.
        merged: Which of query, key and value a `MergedLinear` adapts, which the file does not hold either.

    Returns:
        The adapter.

    Raises:
        InputError: Alpha is not given.
        ConfigError: It is not above zero, or the parts are none.
    """
    if alpha is None:
        raise InputError(
            f"{path} is of loralib, whose files do not hold alpha: give --alpha, or alpha=; loralib's own scripts train"
            " RoBERTa base on MNLI with r 8 and alpha 16, GPT-2 on E2E with r 4 and alpha 32"
        )
    if not alpha > 0:
        raise ConfigError(f"alpha is {alpha}; it must be above 0")
    unknown = [part for part in merged if part not in _PARTS]
    if unknown or len(set(merged)) != len(merged):
        raise ConfigError(f"merged parts are {', '.join(merged)}; each is one of {', '.join(_PARTS)}, once")
    pairs = sorted({name.removesuffix(_A).removesuffix(_B) for name in tensors if name.endswith((_A, _B))})
    lone = [path for path in pairs if path + _A not in tensors or path + _B not in tensors]
    if lone:
        raise CheckpointError(f"{path} holds A without B, or B without A: {', '.join(lone[:_SHOWN])}")
    whole = {name: t for name, t in tensors.items() if not name.endswith((_A, _B))}
    renamed = {PREFIX + name: tensor for name, tensor in tensors.items()}
    read = partial(_translate, path, tensors, pairs, whole, alpha, tuple(merged))
    return Foreign("a state dict of loralib", path, renamed, None, "", read)


def _translate(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    pairs: Sequence[str],
    whole: Mapping[str, torch.Tensor],
    alpha: float,
    merged: tuple[str, ...],
    model: nn.Module,
    family: FamilyMap,
) -> Translation:
    """The translation for a live base."""
    sites = _sites(pairs, family, path)
    heads = new_modules(model, "classification") if hasattr(model.config, "num_labels") else []
    others = [name for name in whole if name.partition(".")[0] not in heads]
    if others:
        raise ConfigError(
            f"{path} holds tensors of the base, trained in place, which method lora cannot take from it:"
            f" {', '.join(others[:_SHOWN])}"
        )
    found = {PREFIX + name: tensor for name, tensor in whole.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for pair in pairs:
        site = sites[pair]
        a, b, parts = _unmerged(pair, tensors[pair + _A], tensors[pair + _B], site.out_features, merged)
        ranks[site.path], alphas[site.path] = a.shape[0], alpha * parts
        found[f"{PREFIX}{site.path}.lora_A.weight"] = a
        found[f"{PREFIX}{site.path}.lora_B.weight"] = b
    rank, scale = max(ranks.values()), max(alphas.values())
    settings: dict[str, Any] = {
        "rank": rank,
        "alpha": scale,
        "dropout": 0.0,
        "targets": name_targets(ranks, family),
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != scale},
    }
    notes = [f"alpha {alpha:g} was given and is not in the file; dropout is set to 0, for the file has none"]
    if scale != alpha:
        notes.append(
            f"merged layers are kept as one LoRA of rank {rank} and alpha {scale:g}, which is the same update; going on to"
            " train it trains B where loralib holds it at zero"
        )
    return Translation(
        "lora", settings, found, tuple(notes), {name: alphas[name] / ranks[name] for name in ranks}
    )


def _sites(names: Sequence[str], family: FamilyMap, path: Path) -> dict[str, Site]:
    """The linear layer that each name of the file stands for: its own path, or the one that ends in it or that it ends in.

    Raises:
        CheckpointError: A name stands for none, or for several; says which, and what the base has.
    """
    linear = [site for site in family.sites if site.linear]
    by_path = {site.path: site for site in linear}
    found: dict[str, Site] = {}
    lacking: dict[str, int] = {}
    for name in names:
        alike = [s for s in linear if s.path.endswith(f".{name}") or name.endswith(f".{s.path}")]
        chosen = [by_path[name]] if name in by_path else alike
        if len(chosen) == 1:
            found[name] = chosen[0]
        else:
            lacking[name] = len(chosen)
    if not lacking:
        return found
    name, number = next(iter(lacking.items()))
    what = "is no linear layer" if not number else f"is {number} linear layers"
    raise CheckpointError(
        f"{path}: '{name}' {what} of this {family.model_type} model; {len(lacking)} of its {len(names)} adapted layers are"
        f" not found there by their paths or the ends of these; the model has {nearest(name, list(by_path))} ...: the file"
        " belongs to another base, or to another class of it"
    )


def _unmerged(
    name: str, a: torch.Tensor, b: torch.Tensor, out_features: int, merged: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A (rank, in) and B (out, rank) of a plain LoRA, and of how many parts they are made."""
    if a.dim() != 2 or b.dim() != 2 or not b.shape[1] or a.shape[0] % b.shape[1]:
        raise CheckpointError(f"'{name}': A {tuple(a.shape)} and B {tuple(b.shape)} are no pair")
    parts, rank, size = a.shape[0] // b.shape[1], b.shape[1], out_features // len(_PARTS)
    if parts == 1 and b.shape[0] == out_features:
        return a.contiguous(), b.contiguous(), 1
    if b.shape[0] != size * parts or parts > len(_PARTS) or size * len(_PARTS) != out_features:
        raise CheckpointError(
            f"'{name}': A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a layer of {out_features} outputs"
        )
    if len(merged) != parts:
        raise InputError(
            f"'{name}' adapts {parts} of query, key and value, and the file does not say which: give --merged, or merged=;"
            " loralib's own GPT-2 scripts adapt query,value"
        )
    grown = torch.zeros(out_features, a.shape[0], dtype=b.dtype)
    for place, part in enumerate(sorted(merged, key=_PARTS.index)):
        row = _PARTS.index(part) * size
        column = slice(place * rank, (place + 1) * rank)
        grown[row : row + size, column] = b[place * size : (place + 1) * size]
    return a.contiguous(), grown, parts
