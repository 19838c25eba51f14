"""Everything peftlab raises, as one tree.

```
PeftlabError                    exit code
├── InputError                  2   the person's input is wrong; nothing heavy has started
│   ├── ConfigError                 an unknown key, a bad value, settings that do not fit together
│   ├── UnknownNameError            a task, method, metric, target, strategy or preset that does not exist
│   ├── DataError                   a data file or folder that is missing, malformed or empty
│   ├── ModelError                  a model that cannot be loaded or does not suit the task
│   ├── TargetError                 a target group or module name that matches nothing in this model
│   ├── MethodError                 a method that has no place in this model, or not with these settings
│   ├── MissingPeftError            LoRA was asked for where peft is not installed
│   ├── ScheduleError               phases that overlap, leave gaps or do not fit the run
│   └── OutputError                 an output folder that cannot be written, or a disk that is full
├── RunError                    1   a run that started and failed
│   ├── NotTrainingError            law 1 is broken: an active tensor does not train, a frozen one moved
│   ├── NonFiniteError              a loss or gradient that is NaN or infinite
│   ├── CheckpointError             a checkpoint or bundle that is damaged or belongs to something else
│   └── EvaluationError             an evaluation that could not be completed
│       └── NotComputedError            one metric that lacks a program or data here; the others are computed
└── Interrupted                 75  stopped by a signal after saving; `peftlab run --resume` goes on
```
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftlabError(Exception):
    """Base of every error that peftlab raises on purpose.

    Attributes:
        exit_code: What the command line exits with when this reaches it.
    """

    exit_code = 1


class InputError(PeftlabError, ValueError):
    """The person's input is wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown, has a bad value, or does not fit another setting."""


class UnknownNameError(InputError):
    """A name that no file answers to.

    Args:
        kind: What was looked for, e.g. "task".
        name: The name as given.
        known: The names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        choices = sorted(known)
        super().__init__(
            f"unknown {kind} '{name}'{did_you_mean(name, choices)}; there is: {', '.join(choices)}"
        )
        self.kind, self.name, self.known = kind, name, choices


class DataError(InputError):
    """A data file or folder is missing, malformed or empty."""


class ModelError(InputError):
    """A model cannot be loaded or does not suit the task."""


class TargetError(InputError):
    """A target group or module name matches nothing in this model."""


class MethodError(InputError):
    """A method has no place in this model, or not with these settings."""


class MissingPeftError(InputError, RuntimeError):
    """LoRA was asked for where peft is not installed."""


class ScheduleError(InputError):
    """Phases overlap, leave gaps or do not fit the run."""


class OutputError(InputError):
    """The output folder cannot be written or the disk is full."""


class RunError(PeftlabError):
    """A run that started and failed."""


class NotTrainingError(RunError):
    """Law 1 is broken: an active tensor does not train, or a frozen one moved."""


class NonFiniteError(RunError):
    """A loss or a gradient is NaN or infinite."""


class CheckpointError(RunError):
    """A checkpoint or bundle is damaged, or belongs to something else."""


class EvaluationError(RunError):
    """An evaluation could not be completed."""


class NotComputedError(EvaluationError):
    """One metric lacks a program or data on this machine; the message says what to install.

    Whoever scores with several metrics keeps the message in the metric's place and goes on with the others; it never
    becomes a 0.
    """


class Interrupted(PeftlabError):
    """Stopped by a signal after saving; the run can be resumed."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt name.

    Args:
        name: The name as given.
        known: The names that exist.

    Returns:
        " (did you mean 'x'?)", or "" where nothing is close.

    Example:
        >>> did_you_mean("loar", ["lora", "full"])
        " (did you mean 'lora'?)"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.55)
    return f" (did you mean '{close[0]}'?)" if close else ""
