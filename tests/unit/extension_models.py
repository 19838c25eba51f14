"""What tests of the model extensions ask of the three classes, by one set of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

import tiny_models
from peftlab.extensions.config import ExtensionConfig
from peftlab.extensions.hybrid import HybridExtension
from peftlab.extensions.lora import LoRAExtension
from peftlab.extensions.new_layer import TransformerLayerExtension

NAMES = ("t5", "bart", "llama", "gpt2", "bert")


class Face(NamedTuple):
    """A class and the names of its calls."""

    extension: Any
    create: str
    save: str
    load: str
    tasks: str
    info: str


FACES = {
    "lora": Face(
        LoRAExtension, "create_adapter", "save_adapter", "load_adapter", "list_adapters", "get_adapter_info"
    ),
    "new_layer": Face(
        TransformerLayerExtension,
        "add_layer",
        "save_checkpoint",
        "load_checkpoint",
        "list_checkpoints",
        "get_checkpoint_info",
    ),
    "hybrid": Face(
        HybridExtension,
        "create_hybrid",
        "save_hybrid_model",
        "load_hybrid_model",
        "list_hybrid_models",
        "get_hybrid_info",
    ),
}


def config(kind: str, folder: Path | None = None, **changes: Any) -> ExtensionConfig:
    """Small settings that have an effect."""
    small: dict[str, Any] = {} if kind == "new_layer" else {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    return ExtensionConfig(**small | ({} if folder is None else {"save_directory": folder}) | changes)


def extension(kind: str, base: Any, folder: Path | None = None, **changes: Any) -> Any:
    """One of the three classes on a base."""
    return FACES[kind].extension(base, config(kind, folder, **changes))


def create(kind: str, made: Any, task: str = "python") -> Any:
    return getattr(made, FACES[kind].create)(task)


def save(kind: str, made: Any, model: Any, task: str = "python", *values: Any, **named: Any) -> Path:
    return getattr(made, FACES[kind].save)(model, task, *values, **named)


def load(kind: str, made: Any, task: str = "python", **named: Any) -> Any:
    return getattr(made, FACES[kind].load)(task, **named)


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.inputs(name)).logits


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def awaken(model: Any, seed: int = 5) -> Any:
    """Move everything that trains, zeros at the start among it."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source).to(parameter.dtype))
    return model.eval()


def train(model: Any, name: str, steps: int = 3) -> Any:
    """Optimizer steps on everything that trains."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny_models.training_inputs(name, seed=step)).loss.backward()
        optimizer.step()
    return model.eval()


def state_of(base: Any) -> list[Any]:
    """Everything about a base that must stay: modules, keys, bits, flags, config."""
    return [
        [id(module) for module in base.modules()],
        {name: tensor.clone() for name, tensor in base.state_dict().items()},
        {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()},
        [sorted(vars(module)) for module in base.modules()],
        [module.training for module in base.modules()],
        id(base.config),
        base.config.to_json_string(),
        dict(base._parameters),
    ]


def unchanged(before: list[Any], base: Any) -> bool:
    now = state_of(base)
    bits = all(torch.equal(tensor, now[1][name]) for name, tensor in before[1].items())
    return bits and before[1].keys() == now[1].keys() and before[:1] + before[2:] == now[:1] + now[2:]
