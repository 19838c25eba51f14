"""Which methods work on which models, found by trying each on a tiny random model.

`peftlab list methods --prove` runs this. A cell is one method with its default settings on one architecture and one kind of
task: attached to a tiny model, trained until law 1 is shown, switched off, saved and put back, removed. What cannot be is
refused by the method itself, and the cell says why; anything else that goes wrong is a failure and says what.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import nn

from peftlab.batches import IGNORED
from peftlab.catalog import METHODS
from peftlab.errors import MethodError, PeftlabError, TargetError
from peftlab.gradients import read_gradients
from peftlab.mapping import map_model
from peftlab.mapping.twin import build_twin, twin_config
from peftlab.method import Attachment, Head
from peftlab.objective import ModelLoss
from peftlab.proof import TrainingProof, fingerprint
from peftlab.schedule import Schedule, place_phases

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
    ("vit", "classification", "ViTForImageClassification"),
)
"""Model type, kind of task, and the class that is tried."""
WORKS, REFUSED, FAILED = "works", "refused", "fails"
_ROWS, _LENGTH, _RATE, _STEPS, _RUN = 2, 10, 1e-2, 4, 20
_LABELS = 3


@dataclass(frozen=True, slots=True)
class Capability:
    """How one method does on one model.

    Attributes:
        method: Its name.
        model_type: transformers' model type.
        head: The kind of task.
        verdict: "works", "refused" or "fails".
        reason: Why not; "" where it works.
        tensors: Tensors it trains.
        parameters: Parameters it trains.
        base_parameters: Parameters of the base.
        identity: Whether a fresh adapter leaves the model's answers as they are (to 1e-5).
    """

    method: str
    model_type: str
    head: str
    verdict: str
    reason: str = ""
    tensors: int = 0
    parameters: int = 0
    base_parameters: int = 0
    identity: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def prove_methods(tell: Callable[[Capability], object] | None = None) -> dict[str, Any]:
    """Try every method on every model.

    Args:
        tell: Is given each result as it comes.

    Returns:
        Plain values: versions, and a row for each cell under "cells".
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # everything is tiny: more threads only wait for each other
    try:
        cells = []
        for capability in _cells():
            cells.append(capability.to_json())
            if tell is not None:
                tell(capability)
    finally:
        torch.set_num_threads(threads)
    versions = {name: metadata.version(name) for name in ("peft", "transformers", "torch")}
    return {"versions": versions, "cells": cells}


def _cells() -> Iterator[Capability]:
    """Every cell of the table, one after the other."""
    for name, head, class_name in MODELS:
        for method in METHODS.names():
            yield try_method(method, name, head=head, class_name=class_name)


def try_method(method: str, model_type: str, *, head: Head, class_name: str) -> Capability:
    """Try one method on one architecture.

    Args:
        method: A leaf of `methods/`.
        model_type: transformers' model type.
        head: The kind of task.
        class_name: transformers' class.

    Returns:
        The cell.
    """
    model = _tiny(model_type, class_name)
    cell = Capability(
        method, model_type, head, WORKS, base_parameters=sum(p.numel() for p in model.parameters())
    )
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # what peft and transformers remark is not what is asked here
            return _try(cell, model, head)
    except (MethodError, TargetError) as error:
        return replace(cell, verdict=REFUSED, reason=str(error))
    except Exception as error:  # noqa: BLE001 - model code can fail in any way; the table says how
        name = "" if isinstance(error, PeftlabError) else f"{type(error).__name__}: "
        return replace(cell, verdict=FAILED, reason=f"{name}{error}".splitlines()[0][:200])


def _tiny(model_type: str, class_name: str) -> nn.Module:
    """A tiny random model, float32, on the CPU."""
    import transformers

    config = transformers.CONFIG_MAPPING[model_type]()
    config.num_labels = _LABELS
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = (
            0  # as every T5 that was trained has it; the library's default config leaves it open
        )
    return build_twin(getattr(transformers, class_name), twin_config(config))


def _try(cell: Capability, model: nn.Module, head: Head) -> Capability:
    """Attach, train, switch off, put back, remove; the cell with what is found."""
    batch = _batch(model, head)
    marks = {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}
    bare = _answers(model, batch)
    leaf = METHODS.load(cell.method)
    attached: Attachment = leaf.attach(model, map_model(model), leaf.Settings(), head=head, seed=0)
    attached.model.eval()
    identity = bool((_answers(attached.model, batch) - bare).abs().max() <= 1e-5)
    parameters = attached.parameters()
    _train(attached, batch, head)
    trained = _answers(attached.model, batch)
    with attached.disabled():
        if not torch.equal(_answers(attached.model, batch), bare):
            raise AssertionError("switched off, the model does not answer as the base does")
    kept = attached.tensors()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    attached.load(kept)
    if not torch.equal(_answers(attached.model, batch), trained):
        raise AssertionError("put back, the adapter does not answer as before")
    base = attached.remove()
    after = {name: fingerprint(tensor) for name, tensor in base.state_dict().items()}
    if after != marks:
        raise AssertionError("removed, the adapter leaves another base behind")
    count = sum(p.numel() for p in parameters.values())
    return replace(cell, tensors=len(parameters), parameters=count, identity=identity)


def _train(attached: Attachment, batch: dict[str, torch.Tensor], head: Head) -> None:
    """Train until law 1 is shown."""
    parameters = attached.parameters()
    needed = max(attached.steps_to_train(name) for name in parameters)
    steps = max(_STEPS, needed)
    attached.begin(Schedule(place_phases([], total_steps=_RUN), _RUN, _RATE, 0))
    optimizer = torch.optim.AdamW(parameters.values(), lr=_RATE)
    proof, objective = TrainingProof(parameters, attached.steps_to_train), ModelLoss(head)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    proof.enter("all")
    attached.model.train()
    shown = None
    for step in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(objective.total(attached.model, batch) / objective.count(batch))
        proof.observe(read_gradients(parameters), step=step + 1)
        optimizer.step()
        shown = proof.after_step(learning_rate=_RATE, step=step + 1) or shown
        attached.after_step(step + 1)
    attached.model.eval()
    if shown is None:
        raise AssertionError(f"not every tensor was shown to train in {steps} steps")
    if shown.unreached:
        raise AssertionError(f"the forward pass does not reach {', '.join(shown.unreached[:3])}")


def _batch(model: Any, head: Head) -> dict[str, torch.Tensor]:
    """Two rows with labels."""
    source = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        pixels = torch.randn(_ROWS, channels, size, size, generator=source)
        return {"pixel_values": pixels, "labels": torch.arange(_ROWS) % _LABELS}
    ids = torch.randint(10, 100, (_ROWS, _LENGTH), generator=source)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if head == "causal":
        labels = ids.clone()
        labels[:, :3] = IGNORED
    elif head == "seq2seq":
        labels = torch.randint(10, 100, (_ROWS, _LENGTH - 3), generator=source)
    else:
        labels = torch.arange(_ROWS) % _LABELS
    return batch | {"labels": labels}


@torch.no_grad()
def _answers(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a batch at the last positions, of which every method gives the same number."""
    logits: torch.Tensor = model(**copy.copy(batch)).logits
    return logits[:, -1].clone()
