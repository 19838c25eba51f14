"""Config in, finished run out.

resolve -> run folder -> base -> evaluation before -> adapter -> training -> best checkpoint -> bundle ->
evaluation after -> report -> DONE. A killed run goes on at the last good checkpoint and keeps what was finished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from peftlab.config import RunConfig, build_config
from peftlab.devices import choose_device, num_processes, process_rank
from peftlab.errors import Interrupted, ModelError
from peftlab.execution import Execution
from peftlab.files import read_yaml
from peftlab.memory.fitting import NOT_PREDICTED, plan_memory
from peftlab.memory.splitting import describe_split, longest_batch, split_step
from peftlab.resolve import Resolved, resolve
from peftlab.run import RunFolder


def plan(config: RunConfig, *, memory: int | None = None, largest_batch: bool = False) -> dict[str, Any]:
    """What a run would do, without doing it.

    Args:
        config: What is asked for.
        memory: Bytes there are; None looks at the device.
        largest_batch: Whether the largest batch that fits is looked for where the run fits too; it takes seconds more.

    Returns:
        The pre-flight, as in `preflight.json`, and under "memory" whether the longest batch fits; where that cannot be
        predicted, the verdict "not predicted" and the reason.

    Raises:
        InputError: Something does not match, or the batch size is to be chosen by a prediction that cannot be made.
    """
    resolved = resolve(config)
    if config.training.auto_batch_size:
        resolved = _split(resolved, memory=memory, confirm=False)
    longest = longest_batch(resolved.train_rows, resolved.config.training.batch_size)
    try:
        planned = plan_memory(
            resolved.config, source=resolved.source, shape=longest, memory=memory, search=largest_batch
        ).as_dict()
    except ModelError as error:  # such a run can be trained; only nothing can be said of its memory
        planned = {"verdict": NOT_PREDICTED, "reason": str(error)}
    return resolved.preflight | {"memory": planned}


def execute(
    config: RunConfig,
    resume: Path | None = None,
    *,
    show: Callable[[str], None] = print,
) -> RunFolder:
    """Carry out a run.

    Args:
        config: What is asked for; a resumed run has its own.
        resume: The folder of a run to go on with.
        show: Receives the lines for the person.

    Returns:
        The finished run.

    Raises:
        InputError: Something does not fit; nothing heavy has started.
        RunError: The run failed.
        Interrupted: It was stopped by a signal after saving a checkpoint.
    """
    if resume is not None:
        if RunFolder(resume).is_finished:
            show(f"already finished: {resume}")
            return RunFolder(resume)
        config = build_config(read_yaml(resume / "config.yaml"))
    resolved = resolve(config)
    if config.training.auto_batch_size and resume is None:  # what is resumed goes on as it was split
        resolved = _split(resolved)
    first = process_rank() == 0
    run = _open_folder(resolved.config, resume)
    try:
        Execution(resolved, run, show if first else _silent).carry_out()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with peftlab run --resume {run.path}") from None
    except Exception as error:
        if first and not isinstance(error, Interrupted):
            run.append_event("run_failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return run


def _split(resolved: Resolved, *, memory: int | None = None, confirm: bool = True) -> Resolved:
    """The run with its steps split into batches that fit."""
    longest = longest_batch(resolved.train_rows, resolved.config.training.batch_size)
    config, choice = split_step(
        resolved.config, source=resolved.source, shape=longest, memory=memory, confirm=confirm
    )
    notes = [*resolved.preflight["notes"], describe_split(choice)]
    return replace(resolved, config=config, preflight=resolved.preflight | {"notes": notes})


def _silent(_: str) -> None:
    """Shows nothing: what processes other than the first say."""


def _open_folder(config: RunConfig, resume: Path | None) -> RunFolder:
    """The run folder, made by the first process and told to the others."""
    path: list[str | None] = [None]
    if process_rank() == 0:
        run = (
            RunFolder(resume)
            if resume is not None
            else RunFolder.create(config.output.directory, config.run_name())
        )
        path = [str(run.path)]
    if num_processes() > 1:
        device = choose_device(config.model.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not distributed.is_initialized():  # the others wait while the first process evaluates
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(hours=12))
        distributed.broadcast_object_list(path)
    return RunFolder(Path(str(path[0])))
