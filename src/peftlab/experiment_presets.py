"""S1's `PRESETS`: made from `assets/presets/`, so that their numbers stand in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from peftlab.commands.presets import preset_names
from peftlab.errors import UnknownNameError
from peftlab.experiment_config import ExperimentConfig


class Presets(Mapping[str, Callable[[], ExperimentConfig]]):
    """S1's presets that are there: name to a function that makes the experiment.

    Example:
        >>> PRESETS["e2e_attention"]().lora.r
        8
    """

    _names = ("e2e_attention", "e2e_mlp", "samsum_attention", "samsum_mlp")

    def __getitem__(self, name: str) -> Callable[[], ExperimentConfig]:
        """The function that makes a preset's experiment.

        Args:
            name: A preset.

        Returns:
            A function without arguments; every call gives a new experiment.

        Raises:
            UnknownNameError: No such preset here (yet); says which there are.
        """
        if name not in list(self):
            raise UnknownNameError("preset", name, self)
        return lambda: _preset(name)

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._names if name in preset_names())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _preset(name: str) -> ExperimentConfig:
    """A preset's experiment."""
    from peftlab.commands.sources import config_from

    return ExperimentConfig.from_run_config(config_from(preset=name))


PRESETS = Presets()
