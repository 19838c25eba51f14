"""The fields of one type of peft, as this peft has them: what may stand in `method.config`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peftlab.attaching.peft_types import NOT_TAKEN, REFUSED, peft_type_names
from peftlab.catalog import METHODS
from peftlab.commands.listing import Row, columns
from peftlab.commands.schema import plain_text, type_text
from peftlab.errors import UnknownNameError


def describe_type(kind: str) -> str:
    """How a type is chosen, and what may be set on it.

    Args:
        kind: The type, in upper or lower case.

    Returns:
        Text for a terminal.

    Raises:
        UnknownNameError: peft has no such type.
    """
    name = kind.lower().replace("-", "_")
    if name not in peft_type_names():
        raise UnknownNameError("peft type", kind, peft_type_names())
    if name in METHODS.names():
        return f"{name} is a method of its own here, with its own settings: peftlab list methods {name}"
    if name in REFUSED:
        return f"{name} does not work here: {REFUSED[name]}"
    return f"{name}: chosen by --method peft --set method.type={name}\n\n{columns(type_rows(name))}"


def type_rows(name: str) -> list[Row]:
    """The fields of a type's config that a person may set.

    Args:
        name: The type, in lower case.

    Returns:
        Header and a row of key, default and peft's own text for each.
    """
    config: Any = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value.lower() == name)
    rows: list[Row] = [("KEY", "DEFAULT", "WHAT IT IS FOR, IN PEFT'S WORDS [TYPE]")]
    for field in dataclasses.fields(config):
        if field.init and field.name not in NOT_TAKEN:
            rows.append((f"method.config.{field.name}", _default(field), f"{_text(field)} [{_kind(field)}]"))
    return rows


def _default(field: Any) -> str:
    """A field's default as YAML writes it; "" where it must be given."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    value = getattr(value, "value", value)
    return plain_text(value) if isinstance(value, str | bool | int | float | list | None) else str(value)


def _text(field: Any) -> str:
    """The text that peft has for a field, on one line."""
    return " ".join(str(field.metadata.get("help", "")).split())


def _kind(field: Any) -> str:
    """A field's type in words; as peft writes it where that is a text."""
    if not isinstance(field.type, str):
        return type_text(field.type)
    return re.sub(r"Optional\[(.*)\]", r"\1 or null", field.type)
