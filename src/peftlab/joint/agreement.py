"""What runs must agree on to train together, read from their configs before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftlab.config import RunConfig
from peftlab.errors import ConfigError

_OWN_OF_MODEL = {"auto_dtype"}
"""Keys of the model's section that a run writes itself."""
_METHOD, _SCOPE = "lora", "model"


def check_agreement(configs: Mapping[str, RunConfig]) -> None:
    """Refuse configs whose runs cannot train together: base, task, data and layout are one, the rest is each run's own.

    Args:
        configs: What a message calls the run, to its config.

    Raises:
        ConfigError: A config asks for what cannot be had beside others, or for another base, task or layout than the
            first one; all problems at once, each with config and key.
    """
    if len(configs) < 2:
        raise ConfigError(f"{len(configs)} run given; two or more train together, one alone by `peftlab run`")
    problems = [line for name, config in configs.items() for line in _alone(name, config)]
    (first, reference), *others = configs.items()
    shared = _shared(reference)
    for name, config in others:
        own = _shared(config)
        problems += [
            f"{name}: {key} is {_told(own.get(key))}, and {_told(shared.get(key))} in {first}: runs that train together"
            " share base, task, data and layout"
            for key in dict.fromkeys([*shared, *own])
            if own.get(key) != shared.get(key)
        ]
    if problems:
        raise ConfigError("\n".join(problems))


def _alone(name: str, config: RunConfig) -> list[str]:
    """What one config asks for that cannot be had beside others."""
    training, adapter = config.training, config.adapters[0]
    asked = {
        "adapters": (len(config.adapters) > 1, "several towers are adapted"),
        "adapters[0].method": (
            adapter.method != _METHOD,
            f"the method is {adapter.method}, and runs share a base with {_METHOD} alone",
        ),
        "adapters[0].scope": (
            adapter.scope != _SCOPE,
            f"the adapter's scope is {adapter.scope}, and runs share a base with adapters of the whole model alone",
        ),
        "model.gradient_checkpointing": (
            config.model.gradient_checkpointing,
            "dropout would be drawn twice in the pass of all: switch it off",
        ),
        "training.auto_batch_size": (
            training.auto_batch_size,
            "what fits is predicted for one run alone: switch it off",
        ),
        "training.trackers": (
            bool(training.trackers),
            "trackers keep one run of a process: leave them out",
        ),
    }
    return [
        f"{name}: {key}: {reason}; or train this run alone by `peftlab run`"
        for key, (is_asked, reason) in asked.items()
        if is_asked
    ]


def _shared(config: RunConfig) -> dict[str, Any]:
    """Dotted key to value of all that must be the same."""
    values = config.model_dump(mode="json", include={"model", "task"})
    found = {
        f"{section}.{key}": value
        for section, content in values.items()
        for key, value in content.items()
        if not (section == "model" and key in _OWN_OF_MODEL)
    }
    return found | {"model.dtype": config.model.weights_dtype, "training.layout": config.training.layout}


def _told(value: Any) -> str:
    """A value in a message."""
    return "not set" if value is None else repr(value) if isinstance(value, str) else str(value)
