"""The fields of a foreign config: read by name and kind, so that whatever nobody has read can be listed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftlab.errors import ConfigError

_SILENT = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "fan_in_fan_out", "ensure_weight_tying", "megatron_core",
)  # fmt: skip
"""Fields that say nothing about how an adapter answers, or that follow from the base."""


class Fields:
    """The fields of a peft config on disk.

    Args:
        values: As read from JSON.
        defaults: Field to default of this peft's config class; what it does not have is unknown.
        where: The file, for messages.
        ignored: Fields that the person said not to heed.
    """

    def __init__(
        self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str, ignored: Iterable[str] = ()
    ) -> None:
        self.values, self.defaults, self.where = dict(values), dict(defaults), where
        self._read = {*_SILENT, *ignored}

    def take(self, name: str, *kinds: type) -> Any:
        """A field's value.

        Args:
            name: The field.
            kinds: What its value may be, besides None.

        Returns:
            The value; this peft's default where the file lacks it.

        Raises:
            ConfigError: It is of another kind.
        """
        self._read.add(name)
        value = self.values.get(name, self.defaults.get(name))
        wrong = value is not None and not isinstance(value, kinds)
        if wrong or (isinstance(value, bool) and bool not in kinds):
            known = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"{self.where}: '{name}' is {value!r}, and must be {known}")
        return value

    def number(self, name: str) -> float:
        """A field that must be a number.

        Args:
            name: The field.

        Returns:
            The number.

        Raises:
            ConfigError: It is none.
        """
        value = self.take(name, int, float)
        if value is None:
            raise ConfigError(f"{self.where}: '{name}' is missing, and must be a number")
        return value  # type: ignore[no-any-return]

    def count(self, name: str) -> int:
        """A field that must be a whole number.

        Args:
            name: The field.

        Returns:
            The number.

        Raises:
            ConfigError: It is none.
        """
        value = self.take(name, int)
        if value is None:
            raise ConfigError(f"{self.where}: '{name}' is missing, and must be a whole number")
        return value  # type: ignore[no-any-return]

    def pass_over(self, *names: str) -> None:
        """Fields that do not decide how a trained adapter answers.

        Args:
            names: The fields.
        """
        self._read.update(names)

    def set_fields(self) -> dict[str, Any]:
        """What nobody has read and is set: not at this peft's default, nor, where it is unknown, switched off."""
        unread = {name: value for name, value in self.values.items() if name not in self._read}
        return {name: value for name, value in unread.items() if not self._is_off(name, value)}

    def _is_off(self, name: str, value: Any) -> bool:
        """Whether a field has no effect: peft's own rule is that what is new is off."""
        if name in self.defaults and value == self.defaults[name]:
            return True
        return value is None or value is False or (isinstance(value, str | list | dict) and not value)

    def check_all_read(self, method: str) -> None:
        """Refuse fields that have an effect which the method cannot have.

        Args:
            method: The method here.

        Raises:
            ConfigError: There are such fields; lists them.
        """
        left = self.set_fields()
        if not left:
            return
        told = ", ".join(f"{name}={str(value)[:60]}" for name, value in sorted(left.items()))
        unknown = sorted(left.keys() - self.defaults.keys())
        newer = (
            f"; this peft does not know {', '.join(unknown)}, which a newer one may have written"
            if unknown
            else ""
        )
        raise ConfigError(
            f"{self.where} sets what method {method} cannot express: {told}{newer}; where one of them has no effect on the"
            " answers, say so: --ignore NAME, or ignored=[NAME]"
        )
