"""The dtype of a run's base where nobody names one: half precision where this machine is fast at it and the method may.

Whether a processor is fast at bfloat16 is measured once, in a tenth of a second, and remembered with the certificates. What
trains stays in float32 (`attaching.wide_copies`), and so do the loss and the optimizer. A run writes what was chosen into
its config, so that whoever goes on with it, repeats it or loads it has the same.
"""

from __future__ import annotations

import json
import os
import platform
import time
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from peftlab.catalog import METHODS
from peftlab.config import RunConfig
from peftlab.devices import DtypeChoice, bfloat16_instructions, choose_device, explain_dtype
from peftlab.downloads import cache_folder
from peftlab.files import write_json

NARROWEST = 512
"""Hidden features from which products, and not what lies between them, take the time."""
_WORTH = 1.3
_WIDEST = 1024
_ROWS, _TRIES = 512, 5
_FILE = "speed.json"


def settle_dtype(config: RunConfig, model_config: Any) -> tuple[RunConfig, DtypeChoice]:
    """The dtype of a run's base.

    Args:
        config: The run.
        model_config: The base's config of transformers.

    Returns:
        The run with the dtype written out, and why.

    Raises:
        ConfigError: The device is not there.
    """
    device = choose_device(config.model.device)
    choice = explain_dtype(config.model.weights_dtype, device)
    if config.model.dtype != "auto":
        return config, choice
    if config.model.auto_dtype is not None:
        return config, DtypeChoice(choice.dtype, "what auto stood for when the run was made")
    if device.type == "cpu":
        choice = _choose_on_cpu(config, model_config)
    name = str(choice.dtype).removeprefix("torch.")
    model = config.model.model_copy(update={"auto_dtype": name})
    return config.model_copy(update={"model": model}), choice


def _choose_on_cpu(config: RunConfig, model_config: Any) -> DtypeChoice:
    """The dtype on this processor, and why."""
    if not bfloat16_instructions():
        return DtypeChoice(torch.float32, "the CPU has no bfloat16 instructions")
    for adapter in config.adapters:
        if _trains_the_base(adapter.method, adapter.settings):
            return DtypeChoice(torch.float32, f"{adapter.method} trains tensors of the base itself")
    width = getattr(model_config.get_text_config(), "hidden_size", None) or 0
    if width < NARROWEST:
        return DtypeChoice(
            torch.float32, f"at {width} features half precision gains nothing, from {NARROWEST} on it may"
        )
    gain = bfloat16_gain(min(width, _WIDEST))
    found = f"products in bfloat16 take {1 / gain:.2f} of the time of float32 here, measured"
    return DtypeChoice(torch.bfloat16 if gain >= _WORTH else torch.float32, found)


def _trains_the_base(method: str, settings: Any) -> bool:
    """Whether a method trains tensors of the base in place, which half precision would round away."""
    ask = getattr(METHODS.load(method), "trains_the_base", None)
    return bool(ask(settings)) if ask is not None else False


@cache
def bfloat16_gain(width: int) -> float:
    """How many times as fast as in float32 a product in bfloat16 is on this processor.

    Args:
        width: Features.

    Returns:
        Seconds in float32 by seconds in bfloat16, the fastest of five each; remembered for the processor, the version of
        torch and the number of threads.
    """
    path = cache_folder() / _FILE
    key = f"{_processor()}; torch {torch.__version__}; {torch.get_num_threads()} threads; {width} features"
    known = _read(path)
    if key in known:
        return known[key]
    seconds = {dtype: _measure(width, dtype) for dtype in (torch.float32, torch.bfloat16)}
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _read(path) | {key: gain})
    return gain


def _read(path: Any) -> dict[str, float]:
    """What was measured before; a damaged file is measured anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _measure(width: int, dtype: torch.dtype) -> float:
    """Seconds of the fastest product."""
    rows, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(_TRIES + 1):
            began = time.perf_counter()
            F.linear(rows, weight)
            fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _processor() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()} x {os.cpu_count()}"
