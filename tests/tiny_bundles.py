"""Bundles of every method on tiny models, filled with values of which none is where the method starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tiny_models
from peftlab.catalog import METHODS
from peftlab.config import AdapterSettings, ModelSettings
from peftlab.files import CHECKSUMS, checksums, write_json
from peftlab.loading import find_model, hash_tensors, hash_tokenizer
from peftlab.mapping import map_model
from peftlab.schedule import Schedule, place_phases
from peftlab.store import MANIFEST, BundleFacts, attach_saved, save_bundle

LABELS = ("one", "two", "three")


@dataclass(frozen=True)
class Case:
    """One method on one model.

    Attributes:
        method: The method.
        model: A key of `tiny_models.BUILDERS`.
        settings: The method's settings.
        weights: The files that its tensors are read from.
        by_peft: Whether plain peft loads the bundle.
    """

    method: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ("adapter_model.safetensors",)
    by_peft: bool = True


_PROMPT = ("prompt_encoder.safetensors",)
_TOKENS = {"num_virtual_tokens": 3}
CASES: dict[str, Case] = {
    "lora": Case("lora", "llama", {"rank": 4, "targets": "attention_qv"}),
    "lora_all_settings": Case(
        "lora",
        "bert",
        {
            "rank": 4, "targets": "both", "use_dora": True, "use_rslora": True, "bias": "lora_only",
            "rank_pattern": {"attention.query": 2}, "alpha_pattern": {"mlp": 3.0}, "modules_to_save": ["pooler"],
        },
    ),
    "lora_tied": Case("lora", "llama_tied", {"rank": 2, "targets": "all"}),
    "lora_transposed": Case("lora", "gpt2", {"rank": 2, "targets": "attention"}),
    "adalora": Case("adalora", "llama", {"initial_rank": 4, "target_rank": 2, "interval_steps": 2}),
    "ia3": Case("ia3", "t5"),
    "prompt_tuning": Case("prompt_tuning", "gpt2", _TOKENS, _PROMPT),
    "p_tuning": Case("p_tuning", "bert", _TOKENS, _PROMPT),
    "p_tuning_lstm": Case("p_tuning", "llama", _TOKENS | {"encoder": "lstm"}, _PROMPT),
    "prefix_tuning": Case("prefix_tuning", "llama", _TOKENS | {"projection": True}, _PROMPT),
    "prefix_tuning_seq2seq": Case("prefix_tuning", "t5", _TOKENS, _PROMPT, by_peft=False),
    "new_layer": Case("new_layer", "bert", {}, ("new_layer.safetensors",), by_peft=False),
    "hybrid": Case(
        "hybrid", "t5", {"rank": 2}, ("new_layer.safetensors", "adapter_model.safetensors"), by_peft=False
    ),
    "full": Case("full", "llama_tied", {}, ("model.safetensors",), by_peft=False),
    "bitfit": Case("bitfit", "gpt2", {}, ("rewritten.safetensors",), by_peft=False),
    "peft": Case("peft", "llama", {"type": "hira", "config": {"r": 2}}),
}  # fmt: skip
"""Name of a bundle to what it holds; every method is there."""


@dataclass(frozen=True)
class Kept:
    """A bundle, and what its model answers.

    Attributes:
        case: What it holds.
        base: The folder of its base.
        path: Its own folder.
        logits: What its model answers to `tiny_models.inputs`.
    """

    case: Case
    base: Path
    path: Path
    logits: torch.Tensor


@torch.no_grad()
def answers(model: Any, name: str) -> torch.Tensor:
    """The logits of a model for the inputs of its kind."""
    logits: torch.Tensor = model(**tiny_models.inputs(name)).logits
    return logits


def fill(parameters: dict[str, torch.nn.Parameter], seed: int = 5) -> None:
    """Draw every tensor anew, around where it is."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


def attach(case: Case) -> Any:
    """A method on a fresh base, as it starts."""
    leaf = METHODS.load(case.method)
    base = tiny_models.build(case.model)
    settings = leaf.Settings(**case.settings)
    return leaf.attach(base, map_model(base), settings, head=tiny_models.HEADS[case.model], seed=3)


def take_ranks(attachment: Any, model: str, steps: int = 12) -> None:
    """Train AdaLoRA until its last ranks have been taken."""
    attachment.begin(Schedule(place_phases((), total_steps=steps), steps, 1e-2, 0))
    optimizer = torch.optim.AdamW(attachment.parameters().values(), lr=1e-2)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        attachment.model(**tiny_models.training_inputs(model, seed=step)).loss.backward()
        optimizer.step()
        attachment.after_step(step)
    assert min(attachment.ranks().values()) < attachment.config.init_r


def make(case: Case, base: Path, path: Path) -> Kept:
    """A bundle with values of its own.

    Args:
        case: What it holds.
        base: The folder of its base.
        path: Where it goes.

    Returns:
        The bundle.
    """
    attachment = attach(case)
    fill(attachment.parameters())
    if case.method == "adalora":
        take_ranks(attachment, case.model)
    attachment.model.eval()
    head = tiny_models.HEADS[case.model]
    source = find_model(
        ModelSettings(name=str(base)), num_labels=len(LABELS) if head == "classification" else None
    )
    facts = BundleFacts(
        adapter=AdapterSettings(method=case.method, settings=case.settings), base=str(base),
        base_hash=hash_tensors(source), tokenizer_hash=hash_tokenizer(source.tokenizer), prompt="{input} ->", task="tiny",
        head=head, labels=LABELS if head == "classification" else (), seed=42, versions={}, scores={"bleu": 12.5},
    )  # fmt: skip
    save_bundle(attachment, source.tokenizer, facts, path)
    logits = answers(attachment.model, case.model)
    if (
        case.method == "adalora"
    ):  # on disk the ranks that were taken are cut off, which moves a sum's last bits
        cut = answers(attach_saved(tiny_models.build(case.model), path).model, case.model)
        torch.testing.assert_close(cut, logits, rtol=0, atol=1e-5)
        logits = cut
    return Kept(case, base, path, logits)


def make_all(folder: Path) -> dict[str, Kept]:
    """A bundle of every case.

    Args:
        folder: Where they and their bases go.

    Returns:
        Name to bundle.
    """
    bases = {case.model for case in CASES.values()}
    for name in bases:
        tiny_models.save_model(folder / "bases" / name, name)
    (folder / "bundles").mkdir()
    return {
        name: make(case, folder / "bases" / case.model, folder / "bundles" / name)
        for name, case in CASES.items()
    }


def copy_of(kept: Kept, folder: Path) -> Path:
    """A copy of a bundle, to be damaged."""
    return Path(shutil.copytree(kept.path, folder / "bundle"))


def sum_again(bundle: Path) -> None:
    """Make a bundle's checksums fit what is in it, as somebody who means harm would."""
    write_json(bundle / CHECKSUMS, checksums(bundle))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest, and make its checksums fit."""
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    sum_again(bundle)


def change_tensors(
    bundle: Path, file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Change the tensors in a file of a bundle, and make its checksums fit."""
    tensors = {name: tensor.clone() for name, tensor in load_file(bundle / file).items()}
    save_file(change(tensors), bundle / file, metadata={"format": "pt"})
    sum_again(bundle)


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All of a live model that loading could change: bits, what trains, modules and what hangs on them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "bits": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {path: (id(m), type(m), m.training) for path, m in model.named_modules()},
        "own": {
            path: sorted(k for k in vars(m) if not k.startswith("_")) for path, m in model.named_modules()
        },
        "hooks": {
            path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()
        },
        "keys": list(model.state_dict()),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In what two states of a model differ."""
    found = [kind for kind in before if kind != "bits" and before[kind] != after[kind]]
    if before["bits"].keys() != after["bits"].keys():
        return [*found, "names"]
    bits = [
        n for n in before["bits"] if before["bits"][n].numpy().tobytes() != after["bits"][n].numpy().tobytes()
    ]
    return found + bits
