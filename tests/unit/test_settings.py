"""Settings: frozen, strict, and with errors for people."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from peftlab.config import RunConfig
from peftlab.errors import ConfigError
from peftlab.settings import Settings, field_docs, validate


class Inner(Settings):
    """Inner settings."""

    width: int = Field(default=4, ge=1)
    """Width in
    columns."""
    names: tuple[str, ...] = ()


class Outer(Settings):
    """Outer settings."""

    inner: Inner = Inner()
    """What is inside."""
    items: tuple[Inner, ...] = Field(default=(Inner(),), min_length=1)


class Derived(Inner):
    """Settings with a base."""

    depth: int = 1
    """Depth."""


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().width = 3


def test_values_are_kept() -> None:
    assert validate(Outer, {"inner": {"width": 2}}).inner.width == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iner": {}}, r"unknown key 'iner' \(did you mean 'inner'\?\); there is: inner, items"),
        ({"inner": {"widht": 1}}, r"unknown key 'inner.widht' \(did you mean 'width'\?\)"),
        ({"items": [{"wide": 1}]}, r"unknown key 'items.0.wide'.*; there is: width, names"),
        ({"inner": {"width": 0}}, r"'inner.width': must be greater than or equal to 1 \(given: 0\)"),
        ({"inner": {"width": "x"}}, r"'inner.width': must be a valid integer.*\(given: 'x'\)"),
        ({"inner": 3}, r"'inner' must hold keys and values, not 3"),
    ],
)
def test_messages(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(Outer, values)


def test_where_stands_before_the_path() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'method\.rnk'"):
        validate(Inner, {"rnk": 1}, where="method")


def test_all_problems_at_once_and_none_twice() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"inner": {"width": 0, "x": 1}, "items": [{"width": 0}]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert not any("at least 1 item" in line for line in lines), (
        "a list is not too short because an item is wrong"
    )


def test_too_short_is_said_where_it_is_the_problem() -> None:
    with pytest.raises(ConfigError, match="'items': Tuple should have at least 1 item"):
        validate(Outer, {"items": []})


def test_field_docs() -> None:
    assert field_docs(Inner) == {"width": "Width in columns."}
    assert field_docs(Derived) == {"width": "Width in columns.", "depth": "Depth."}


def test_every_setting_is_documented() -> None:
    from peftlab.commands.schema import config_keys

    assert [key.path for key in config_keys() if not key.text] == []
    assert set(field_docs(RunConfig)) <= set(RunConfig.model_fields)
