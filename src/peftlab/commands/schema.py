"""The config tree described: every key with its type, default and text, and the JSON schema for editors.

`RunConfig` holds a method's and a probe's settings as plain mappings, because the leaves own them; here they
are put together, so that a person and an editor see one tree.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from peftlab.catalog import METHODS, PROBES
from peftlab.commands.overlay import DEFAULT_METHOD
from peftlab.config import RunConfig
from peftlab.settings import field_docs


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One leaf of the config tree.

    Attributes:
        path: Its dotted path, e.g. "training.max_steps".
        kind: Its type in words, e.g. "int or null".
        default: Its default as YAML writes it on one line.
        text: What it is for.
    """

    path: str
    kind: str
    default: str
    text: str


def config_keys(method: str = DEFAULT_METHOD) -> list[ConfigKey]:
    """Every key of the config.

    Args:
        method: The method whose settings stand below `method`.

    Returns:
        The keys in the tree's order.

    Raises:
        UnknownNameError: No such method.
    """
    keys: list[ConfigKey] = []
    for name, field in RunConfig.model_fields.items():
        if name == "adapters":
            text = (
                "a method of `peftlab list methods`, what can be set on one: `peftlab list methods NAME`; `adapters` is the"
                " spelling for a list, of which adapters.NUMBER.settings.KEY changes one"
            )
            keys.append(ConfigKey("method.name", "str", DEFAULT_METHOD, text))
            keys += _leaves(METHODS.load(method).Settings, "method")
        elif name == "probes":
            for probe in PROBES.names():
                keys += _leaves(PROBES.load(probe).Settings, f"probes.{probe}")
        else:
            keys += _leaves(field.annotation, name)
    return keys


def default_text(path: str) -> str:
    """The default of a key, as text.

    Args:
        path: A dotted path.

    Returns:
        The default, "" for an unknown path.
    """
    return next((key.default for key in config_keys() if key.path == path), "")


def settings_keys(settings: Any, path: str) -> list[ConfigKey]:
    """Every key of one settings class.

    Args:
        settings: The class.
        path: The path that it stands below, e.g. "method".

    Returns:
        The keys in the class's order.
    """
    return list(_leaves(settings, path))


def _leaves(settings: Any, path: str) -> Iterator[ConfigKey]:
    """The keys below one settings class.

    Args:
        settings: The class.
        path: Its path.

    Yields:
        Its keys, nested ones too.
    """
    docs = field_docs(settings)
    for name, field in settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        text = docs.get(name, "")
        yield ConfigKey(f"{path}.{name}", type_text(field.annotation), plain_text(default), text)


def type_text(annotation: Any) -> str:
    """A type in words.

    Args:
        annotation: The type.

    Returns:
        E.g. "int or null", "cosine | linear | constant".

    Example:
        >>> type_text(int | None)
        'int or null'
    """
    if annotation is None or annotation is type(None):
        return "null"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(part) for part in inner)
    if origin is tuple:
        return (
            f"list of {type_text(inner[0])}"
            if inner[-1] is Ellipsis
            else f"[{', '.join(map(type_text, inner))}]"
        )
    if origin is not None:
        return str(origin.__name__)
    name = str(annotation.__name__)
    return {"Path": "path", "PhaseSettings": "phase"}.get(name, name)


def plain_text(value: Any) -> str:
    """A value as YAML writes it on one line.

    Args:
        value: The value.

    Returns:
        The text; "" for a value that must be given.

    Example:
        >>> plain_text(None), plain_text(True), plain_text(())
        ('null', 'true', '[]')
    """
    if value is PydanticUndefined:
        return ""
    plain = to_jsonable_python(value)
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    if isinstance(plain, list):
        return f"[{', '.join(plain_text(item) for item in plain)}]"
    return f"{plain:g}" if isinstance(plain, float) else str(plain)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file.

    Returns:
        The schema with the text of every key, the settings of every method below `method` and `adapters`, and
        the settings of every probe below `probes`.
    """
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    _add_texts(schema, RunConfig)
    for model in _classes(RunConfig):
        if model.__name__ in definitions:
            _add_texts(definitions[model.__name__], model)
    methods = {
        name: _settings_schema(METHODS.load(name).Settings, METHODS.describe(name), definitions)
        for name in METHODS.names()
    }
    schema["properties"]["method"] = {
        "description": "The single adapter: the method's name and its settings.",
        "anyOf": [_named_method(name, settings) for name, settings in methods.items()],
    }
    definitions["AdapterSettings"]["properties"]["settings"]["anyOf"] = list(methods.values())
    schema["properties"]["probes"] = {
        "type": "object",
        "description": field_docs(RunConfig).get("probes", ""),
        "properties": {name: _probe_schema(name, definitions) for name in PROBES.names()},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "peftlab run config"}
    return head | {key: value for key, value in schema.items() if key != "title"}


def _settings_schema(settings: type[BaseModel], text: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a leaf's settings.

    Args:
        settings: The class.
        text: What the leaf is.
        definitions: Where classes inside it are put.

    Returns:
        The schema.
    """
    schema = settings.model_json_schema()
    definitions.update(schema.pop("$defs", {}))
    _add_texts(schema, settings)
    return {key: value for key, value in schema.items() if key != "title"} | {"description": text}


def _probe_schema(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one probe: its settings, nothing or true for their defaults, false to leave it out."""
    settings = _settings_schema(PROBES.load(name).Settings, PROBES.describe(name), definitions)
    return {"anyOf": [settings, {"type": "boolean"}, {"type": "null"}]}


def _named_method(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of `method: {name: ..., ...}` for one method.

    Args:
        name: The method.
        settings: The schema of its settings.

    Returns:
        The schema.
    """
    chosen = {"const": name, "default": name, "description": settings["description"]}
    required = {} if name == DEFAULT_METHOD else {"required": ["name"]}
    return {**settings, "properties": {"name": chosen, **settings["properties"]}, **required}


def _add_texts(schema: dict[str, Any], settings: type[BaseModel]) -> None:
    """Put the fields' texts into a schema.

    Args:
        schema: The schema of one class, changed in place.
        settings: The class.
    """
    texts = field_docs(settings)
    for name, part in schema.get("properties", {}).items():
        part.pop("title", None)
        if name in texts:
            part["description"] = texts[name]


def _classes(settings: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All settings classes inside a settings class, itself included.

    Args:
        settings: The class.

    Yields:
        The classes, depth first.
    """
    yield settings
    for field in settings.model_fields.values():
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from _classes(annotation)
            else:
                pending += get_args(annotation)
