"""The efficient fine-tuning document's model, smaller, and what its tests do with adapters on it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import tiny_models

VOCABULARY, CLASSES = 40, 11


class Encoder(nn.Module):
    """An embedding, encoder layers of torch, and an output layer."""

    def __init__(self, layers: int = 1, *, batch_first: bool = True, stacked: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=batch_first)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.transformer = nn.TransformerEncoder(layer, layers) if stacked or layers > 1 else layer
        self.output = nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor, **masks: Any) -> torch.Tensor:
        return self.output(self.transformer(self.embedding(ids), **masks))


def encoder(layers: int = 1, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Encoder:
    """A random one in evaluation mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="enable_nested_tensor")
        return tiny_models.randomise(Encoder(layers, **changes)).to(dtype).eval()


def ids(batch: int = 3, length: int = 6, seed: int = 0) -> torch.Tensor:
    """Token ids, (batch, seq)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def awaken(manager: Any, seed: int = 5) -> Any:
    """Give every adapter tensor a value, zeros at the start among them."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in manager.get_trainable_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    return manager


def train(model: nn.Module, parameters: Any, steps: int = 3, **inputs: Any) -> None:
    """Some optimizer steps on whatever the model puts out."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    mode = model.training
    model.train()
    for seed in range(steps):
        optimizer.zero_grad()
        model(ids(seed=seed), **inputs).square().mean().backward()
        optimizer.step()
    model.train(mode)


def agree_and_learn_alike(
    product: Any, reference: Any, pairs: list[tuple[nn.Parameter, torch.Tensor]], steps: int = 3
) -> None:
    """Two functions without arguments: the same outputs, gradients and parameters over some optimizer steps.

    Args:
        product: Gives an output.
        reference: Gives the same one, by hand.
        pairs: What the product trains, and the same tensor of the reference.
        steps: How many steps.
    """
    optimizers = [torch.optim.AdamW(side, lr=0.05) for side in zip(*pairs, strict=True)]
    for _ in range(steps):
        outputs = product(), reference()
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
        for own, by_hand in pairs:
            assert own.grad is not None
            assert own.grad.abs().max() > 0
            torch.testing.assert_close(own.grad, by_hand.grad, rtol=0, atol=1e-9)
        for optimizer in optimizers:
            optimizer.step()
    for own, by_hand in pairs:
        torch.testing.assert_close(own.detach(), by_hand.detach(), rtol=0, atol=1e-9)
