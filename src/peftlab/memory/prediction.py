"""What a training step takes, from a model's config alone: predicted by carrying it out without data.

The peak is that of torch's allocator. What a process holds beside it is no tensor: libraries, and memory that the C
library keeps (see `budget.py`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from peftlab.attaching.towers import attach_adapters
from peftlab.config import RunConfig
from peftlab.devices import DTYPES, choose_device, choose_dtype
from peftlab.errors import ConfigError, InputError, ModelError
from peftlab.loading import ModelSource, choose_head, meta_model, read_config, switch_checkpointing
from peftlab.mapping import map_model
from peftlab.memory.ledger import PARTS
from peftlab.memory.rehearsal import rehearse
from peftlab.memory.steps import BatchShape
from peftlab.method import Attachment

Attach = Callable[[nn.Module], Attachment]
"""From a base to the attachment that is trained."""

_NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """The peak memory of a training step.

    Attributes:
        peak_bytes: Bytes in use at the peak.
        parts: What they are for: a key of `PARTS` to bytes; they sum to the peak.
        moment: When the peak is: "forward pass", "backward pass", "optimizer step" or "between steps".
        shape: The batch.
        dtype: The base's weights, e.g. "bfloat16".
        checkpointing: Whether activations are computed again in the backward pass.
        device: The device whose kernels are meant: "cpu", "cuda" or "mps".
        seconds: What the prediction took.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    moment: str
    shape: BatchShape
    dtype: str
    checkpointing: bool
    device: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-ready values."""
        return asdict(replace(self, parts=dict(self.parts)))


def predict_memory(
    config: RunConfig,
    *,
    source: ModelSource | None = None,
    shape: BatchShape | None = None,
    attach: Attach | None = None,
) -> MemoryPrediction:
    """Predict the peak memory of a run's training steps; no weight is read.

    Args:
        config: The run: its model, method, phases, batch and optimizer.
        source: The base, where it is found already; else its config is read.
        shape: The longest batch; None takes `training.batch_size` rows of `task.max_length` tokens.
        attach: Makes the base tunable; None takes the config's method.

    Returns:
        The prediction.

    Raises:
        ModelError: The config cannot be built, or the model's operations depend on data.
        TargetError: The method's targets match nothing in this model.
        ConfigError: The rows are longer than the model's positions.
    """
    began = time.perf_counter()
    source = source or find_structure(config)
    length = config.task.max_length
    shape = shape or BatchShape(config.training.batch_size, length, length)
    check_positions(source, shape)
    device, dtype = planned_device(config)
    checkpointing = config.model.gradient_checkpointing
    base = build_structure(source, dtype=dtype, checkpointing=checkpointing)
    attachment = (attach or attach_method(config, source))(base)
    try:
        peak = rehearse(attachment, config, shape, head=source.head, device_type=device.type)
    except _NEEDS_DATA as error:
        raise ModelError(
            f"the memory of '{source.name}' ({source.config.model_type}) cannot be predicted: what it computes depends on"
            f" data ({type(error).__name__}: {error})"
        ) from error
    return MemoryPrediction(
        peak_bytes=peak.total_bytes,
        parts={part: peak.parts[part] for part in PARTS},
        moment=peak.moment,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        checkpointing=checkpointing,
        device=device.type,
        seconds=time.perf_counter() - began,
    )


def planned_device(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """Where a run will be and in which dtype; a CUDA device that is named can be planned for where there is none.

    Args:
        config: The run.

    Returns:
        The device, and the dtype of the base's weights.

    Raises:
        ConfigError: The device is neither here nor CUDA.
    """
    name = config.model.device
    if name.startswith("cuda") and not torch.cuda.is_available():
        absent = DTYPES.get(
            config.model.weights_dtype, torch.bfloat16
        )  # what auto means on every such device since 2020
        return torch.device("cuda"), absent
    device = choose_device(name)
    return device, choose_dtype(config.model.weights_dtype, device)


def find_structure(config: RunConfig) -> ModelSource:
    """Find a base by its config alone; it needs no tokenizer and no weights.

    Args:
        config: The run.

    Returns:
        The source, without a tokenizer. A model that cannot generate text is taken as a classifier.

    Raises:
        ModelError: There is no such model, its config cannot be read, or it can neither generate nor classify text.
    """
    location, structure = read_config(config.model)
    name = config.model.name
    try:
        head = choose_head(name, structure, None)
    except ModelError:
        head = choose_head(name, structure, structure.num_labels)
    if head == "classification" and structure.get_text_config().pad_token_id is None:
        structure.pad_token_id = structure.get_text_config().pad_token_id = 0
    return ModelSource(name, location, structure, None, head)


def build_structure(source: ModelSource, *, dtype: torch.dtype, checkpointing: bool) -> nn.Module:
    """The base on the meta device, as loading would leave it.

    Args:
        source: The base.
        dtype: Of its weights.
        checkpointing: Whether activations are computed again in the backward pass.

    Returns:
        The model.

    Raises:
        ModelError: transformers cannot build a model of this config, or it has no checkpointing.
    """
    config = copy.deepcopy(source.config)
    if source.head == "classification" and config.problem_type is None and config.num_labels > 1:
        # every row has one class; told so, DeBERTa does not look for rows without one to leave out of its loss
        config.problem_type = "single_label_classification"
    try:
        model = meta_model(replace(source, config=config), dtype=dtype)
    except InputError:
        raise
    except Exception as error:
        raise ModelError(
            f"no model can be built of the config of '{source.name}' ({config.model_type}): {type(error).__name__}: {error}"
        ) from error
    if checkpointing:
        switch_checkpointing(model, True)
    return model.eval()


def check_positions(source: ModelSource, shape: BatchShape) -> None:
    """Refuse rows that the model has no positions for; without data it would not notice.

    Args:
        source: The base.
        shape: The longest batch.

    Raises:
        ConfigError: They are too long.
    """
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    longest = max(shape.length, shape.label_length)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"task.max_length {longest} is longer than the {positions} positions of '{source.name}'; set --max_length to"
            f" {positions} or less"
        )


def attach_method(config: RunConfig, source: ModelSource) -> Attach:
    """The config's own way to make a base tunable.

    Args:
        config: The run.
        source: The base.

    Returns:
        A function from the base to its attachment.
    """

    def attach(base: nn.Module) -> Attachment:
        return attach_adapters(
            base, map_model(base), config.adapters, head=source.head, seed=config.training.seed
        )

    return attach
