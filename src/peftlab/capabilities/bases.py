"""The tiny random models that methods are tried on, what they read, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlab.batches import IGNORED
from peftlab.catalog import METHODS
from peftlab.mapping import map_model
from peftlab.mapping.twin import build_twin, classifies_by_decoder, twin_config
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss

MODELS: tuple[tuple[str, Head, str], ...] = (
    ("llama", "causal", "LlamaForCausalLM"),
    ("gpt2", "causal", "GPT2LMHeadModel"),
    ("opt", "causal", "OPTForCausalLM"),
    ("mixtral", "causal", "MixtralForCausalLM"),
    ("t5", "seq2seq", "T5ForConditionalGeneration"),
    ("bart", "seq2seq", "BartForConditionalGeneration"),
    ("bert", "classification", "BertForSequenceClassification"),
    ("roberta", "classification", "RobertaForSequenceClassification"),
    ("llama", "classification", "LlamaForSequenceClassification"),
    ("bart", "classification", "BartForSequenceClassification"),
    ("vit", "classification", "ViTForImageClassification"),
)
"""Model type, kind of task, and the class that is tried."""

_ROWS, _LENGTH, _LABELS = 2, 10, 3
PADS = 3
"""Pads at the end of every second row of a text."""
_MOVED = 0.05


@dataclass(frozen=True, slots=True)
class Base:
    """One architecture with one kind of task.

    Attributes:
        model_type: transformers' model type.
        head: The kind of task.
        class_name: transformers' class.
    """

    model_type: str
    head: Head
    class_name: str

    def build(self, dtype: torch.dtype = torch.float32, *, dropout: bool = True) -> Any:
        """A tiny random model on the CPU, always the same.

        Args:
            dtype: Of its tensors; in float64 experts are computed one by one, for torch has no other kernel.
            dropout: Whether its own dropout stays.

        Returns:
            The model in evaluation mode.
        """
        import transformers

        config = transformers.CONFIG_MAPPING[self.model_type]()
        config.num_labels = _LABELS
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # as every trained T5 has it; the default config leaves it open
        if not dropout:
            for name, value in list(vars(config).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(config, name, 0.0)
        kind = getattr(transformers, self.class_name)
        return self.in_dtype(build_twin(kind, twin_config(config), told_apart=False), dtype)

    def in_dtype(self, model: Any, dtype: torch.dtype) -> Any:
        """A model in another dtype; in float64 with experts that torch can compute."""
        if dtype == torch.float64 and any(p.dim() == 3 for p in model.parameters()):
            model.set_experts_implementation("eager")
        return model.to(dtype)

    def batch(self, model: Any, *, rows: int = _ROWS, padded: bool = True) -> dict[str, torch.Tensor]:
        """Rows with labels, of which no two have equally many where a model predicts tokens.

        Args:
            model: The base.
            rows: How many.
            padded: Whether every second row of a text is shorter, with pads at its end.

        Returns:
            Arguments of the model's forward.
        """
        source = torch.Generator().manual_seed(0)
        if model.main_input_name == "pixel_values":
            size, channels = model.config.image_size, model.config.num_channels
            pixels = torch.randn(rows, channels, size, size, generator=source).to(model.dtype)
            return {"pixel_values": pixels, "labels": torch.arange(rows) % _LABELS}
        ids = torch.randint(10, 100, (rows, _LENGTH), generator=source)
        mask = torch.ones_like(ids)
        if padded:
            mask[1::2, _LENGTH - PADS :] = 0
        if classifies_by_decoder(model):
            ids = torch.where(mask.cumsum(1) == mask.sum(1, keepdim=True), model.config.eos_token_id, ids)
        ids = torch.where(mask == 1, ids, model.config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.head == "causal":
            labels = torch.where(mask == 1, ids, IGNORED)
        elif self.head == "seq2seq":
            labels = torch.randint(10, 100, (rows, _LENGTH - 3), generator=source)
        else:
            return batch | {"labels": torch.arange(rows) % _LABELS}
        for row in range(rows):
            labels[row, : 2 + row] = IGNORED
        if self.head == "seq2seq":  # a decoder reads its labels: the ignored ones stand at the end
            labels = labels.flip(1)
        return batch | {"labels": labels}


BASES: tuple[Base, ...] = tuple(Base(*entry) for entry in MODELS)
"""Every architecture that is tried."""


def attach(method: str, base: Base, model: nn.Module, *, seed: int = 0, dropout: bool = True) -> Attachment:
    """A method with its default settings on a model.

    Args:
        method: A leaf of `methods/`.
        base: What the model is.
        model: The model.
        seed: Seeds the adapter.
        dropout: Whether the adapter's own dropout stays.

    Returns:
        The attachment.
    """
    leaf = METHODS.load(method)
    changes = {} if dropout or "dropout" not in leaf.Settings.model_fields else {"dropout": 0.0}
    attached: Attachment = leaf.attach(
        model, map_model(model), leaf.Settings(**changes), head=base.head, seed=seed
    )
    attached.model.eval()
    for parameter in attached.parameters().values():
        parameter.requires_grad_(True)
    return attached


def move(attached: Attachment) -> None:
    """Move every tensor of an adapter off its start by the same random numbers, as training would."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.parameters().values():
            noise = torch.randn(parameter.shape, generator=source)
            parameter.add_(_MOVED * noise.to(parameter.dtype))


@torch.no_grad()
def answers(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a batch; of tokens those at a row's last, counted from the end: virtual tokens stand in front."""
    logits: torch.Tensor = model(**batch).logits
    if logits.dim() < 3:
        return logits.clone()
    pads = (batch["attention_mask"] == 0).sum(1)
    if model.config.is_encoder_decoder:  # the decoder's rows have no pads
        pads = torch.zeros_like(pads)
    return logits[torch.arange(len(logits)), logits.shape[1] - 1 - pads].clone()


def gradients(
    attached: Attachment, head: Head, parts: list[dict[str, torch.Tensor]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradient of one optimizer step as the trainer takes it: a sum over the step's terms by their number.

    Args:
        attached: The adapter.
        head: The kind of task.
        parts: The step's batches.

    Returns:
        The loss, and the gradient of each tensor that has one.
    """
    objective, parameters = ModelLoss(head), attached.parameters()
    terms, total = sum(objective.count(part) for part in parts), 0.0
    for parameter in parameters.values():
        parameter.grad = None
    attached.model.train()
    for part in parts:
        loss = objective.total(attached.model, part) / terms
        torch.autograd.backward(loss)
        total += float(loss.detach())
    attached.model.eval()
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return total, found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of tensors, as a share of the largest value of its tensor (1e-6 at least)."""
    if one.keys() != other.keys():
        return float("inf")
    return max(
        (float((one[n] - other[n]).abs().max()) / max(float(one[n].abs().max()), 1e-6) for n in one),
        default=0.0,
    )


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[list[int]]:
    """A context that counts the forward passes of a module."""
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()
