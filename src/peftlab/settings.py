"""Settings: frozen, strict pydantic models whose errors speak to a person.

Every leaf that can be set owns a `Settings` subclass; the config tree only nests them. Unknown keys are refused with a
suggestion; all problems of one tree are reported at once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from peftlab.errors import ConfigError, PeftlabError, did_you_mean

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def validate(settings: type[S], values: Mapping[str, Any], *, where: str = "") -> S:
    """Build settings from plain values.

    Args:
        settings: The settings class.
        values: Keys and values as read from YAML or a command line.
        where: The path of these settings in the config, for messages, e.g. "method".

    Returns:
        The settings.

    Raises:
        ConfigError: Something is unknown or invalid; every problem stands on its own line.

    Example:
        >>> class Probe(Settings):
        ...     frequency: int = 1
        >>> validate(Probe, {"frequency": 5}).frequency
        5
    """
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        items = [item for item in error.errors() if not _is_consequence(item, error)]
        raise ConfigError("\n".join(_problem(settings, item, where) for item in items)) from None


def _is_consequence(item: Any, error: ValidationError) -> bool:
    """Whether a problem only follows from another: a list is "too short" because an item in it is wrong.

    Args:
        item: One item of pydantic's `errors()`.
        error: The whole error.

    Returns:
        True where it says nothing of its own.
    """
    place = item["loc"]
    inside = [
        other
        for other in error.errors()
        if len(other["loc"]) > len(place) and other["loc"][: len(place)] == place
    ]
    return item["type"] == "too_short" and bool(inside)


def _problem(settings: type[BaseModel], item: Any, where: str) -> str:
    """One problem in a person's words.

    Args:
        settings: The settings class that refused.
        item: One item of pydantic's `errors()`.
        where: The path of the settings in the config.

    Returns:
        The message.
    """
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, PeftlabError):
        return str(cause)
    location = [str(part) for part in item["loc"]]
    path = ".".join([*([where] if where else []), *location])
    if item["type"] == "extra_forbidden":
        parent = _follow(settings, item["loc"][:-1])
        known = list(parent.model_fields) if parent else []
        there = f"; there is: {', '.join(known)}" if known else ""
        return f"unknown key '{path}'{did_you_mean(location[-1], known)}{there}"
    if item["type"] == "missing":
        return f"'{path}' is missing"
    if item["type"] in ("model_type", "dict_type"):
        return f"'{path}' must hold keys and values, not {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    given = f" (given: {item['input']!r})" if path and not isinstance(item["input"], dict) else ""
    return f"'{path}': {message}{given}" if path else message


def _follow(settings: type[BaseModel] | None, location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The settings class that a location inside a tree lies in.

    Args:
        settings: The root.
        location: Keys and list indices.

    Returns:
        The class, or None where the location does not lead to one.
    """
    for part in location:
        if settings is None:
            return None
        if isinstance(part, int):
            continue
        known = settings.model_fields.get(part)
        settings = _model_in(known.annotation) if known else None
    return settings


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class inside a type such as `list[X] | None`.

    Args:
        annotation: The type.

    Returns:
        The first pydantic model in it, or None.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found:
            return found
    return None


def field_docs(settings: type[BaseModel]) -> dict[str, str]:
    """What the docstring below each field says, read from the source.

    Read when somebody asks (help, lists, schema): pydantic's `use_attribute_docstrings` parses the file once for every
    class at import, which costs each command a tenth of a second.

    Args:
        settings: A settings class.

    Returns:
        Field name to its text; fields without a docstring are left out.

    Example:
        >>> from peftlab.schedule import LearningRateSettings
        >>> field_docs(LearningRateSettings)["peak"]
        'Highest learning rate.'
    """
    docs: dict[str, str] = {}
    for owner in reversed(settings.__mro__):
        file = getattr(sys.modules.get(owner.__module__), "__file__", None)
        if file and issubclass(owner, Settings):
            docs |= _docs_in(file).get(owner.__name__, {})
    return docs


@cache
def _docs_in(file: str) -> dict[str, dict[str, str]]:
    """The field docstrings of every class in a file.

    Args:
        file: Path of the source file.

    Returns:
        Class name to field name to text.
    """
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found.setdefault(node.name, {})[field.target.id] = " ".join(text.value.value.split())
    return found
