"""The rows of an optimizer step in as few forward passes as fit into memory.

How many rows make a step is part of what is learned; in how many passes they are computed is not (decision 0004: the loss
is a sum over the step's terms). So only the second is chosen from the memory that there is.
"""

from __future__ import annotations

from peftlab.batches import Row
from peftlab.config import RunConfig
from peftlab.devices import num_processes
from peftlab.errors import ConfigError
from peftlab.loading import ModelSource
from peftlab.memory.fitting import BatchChoice, choose_batch_size
from peftlab.memory.measuring import confirm_with
from peftlab.memory.steps import BatchShape


def longest_batch(rows: list[Row], num_rows: int) -> BatchShape:
    """The batch that takes the most memory.

    Args:
        rows: All rows that are trained on.
        num_rows: Rows of one batch.

    Returns:
        Its shape: the longest input and the longest labels of any row.
    """
    return BatchShape(num_rows, max(len(row.input_ids) for row in rows), max(len(row.labels) for row in rows))


def split_step(
    config: RunConfig,
    *,
    source: ModelSource,
    rows: list[Row],
    memory: int | None = None,
    confirm: bool = True,
) -> tuple[RunConfig, BatchChoice]:
    """Choose batch size and accumulation steps anew, with the same product, so that the longest batch fits.

    Args:
        config: The run; `batch_size` times `accumulation_steps` rows make its step.
        source: The base.
        rows: All rows that are trained on.
        memory: Bytes there are; None looks at the device.
        confirm: Whether one real step on the longest batch, with the base's weights, is taken and measured.

    Returns:
        The config with both numbers, and what was predicted and measured.

    Raises:
        ConfigError: Several processes would have to choose the same.
        ModelError: Not even one row fits, or its memory cannot be predicted.
        RunError: The real step took more than there is.
    """
    if num_processes() > 1:
        raise ConfigError(
            "training.auto_batch_size (--auto_batch_size) looks at the memory of one process, and this run has"
            f" {num_processes()}; set training.batch_size and training.accumulation_steps, `peftlab plan` says what fits"
        )
    training = config.training
    total = training.batch_size * training.accumulation_steps
    sizes = [size for size in range(1, total + 1) if total % size == 0]
    choice = choose_batch_size(
        config,
        source=source,
        shape=longest_batch(rows, training.batch_size),
        memory=memory,
        sizes=sizes,
        confirm=confirm_with(config, source) if confirm else None,
    )
    chosen = {"batch_size": choice.batch_size, "accumulation_steps": total // choice.batch_size}
    return config.model_copy(update={"training": training.model_copy(update=chosen)}), choice


def describe_split(choice: BatchChoice, accumulation_steps: int) -> str:
    """A choice in words.

    Args:
        choice: What was chosen.
        accumulation_steps: Forward passes of a step.

    Returns:
        One line for a pre-flight.
    """
    said = (
        f"auto_batch_size: {choice.batch_size} rows x {accumulation_steps} forward passes a step; predicted peak of the"
        f" longest batch {choice.prediction.peak_bytes:,} bytes"
    )
    if choice.measured is not None:
        said += f", measured {choice.measured.peak_bytes:,} ({choice.measured.account})"
    return said
