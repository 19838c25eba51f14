"""What can be set on one thing: `peftlab list methods NAME` and its like, and peft's types with their page."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftlab.attaching import peft_types
from peftlab.attaching.peft_type_fields import describe_type
from peftlab.attaching.peft_types import peft_type_names
from peftlab.catalog import METHODS
from peftlab.cli import main
from peftlab.commands.listing import list_kind
from peftlab.commands.peft_types import read_types
from peftlab.errors import InputError, UnknownNameError

PAGE = Path(__file__).parents[2] / "docs" / "peft-types.md"


@pytest.mark.parametrize("name", METHODS.names())
def test_every_setting_of_a_method_is_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods", name]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{name}: {METHODS.describe(name)}\nchosen by --method {name}\n")
    listed = [line.split()[0] for line in page.splitlines() if line.startswith("method.")]
    assert listed == [f"method.{setting}" for setting in METHODS.load(name).Settings.model_fields]
    assert main(["list", "config", "--method", name]) == 0
    assert capsys.readouterr().out == page


def test_the_help_says_where_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "list"):
        assert main([verb, "--help"]) == 0
        assert "list methods " in capsys.readouterr().out


def test_the_page_of_peft_s_types_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == list_kind("peft_types", markdown=True) + "\n"
    for name, row in read_types().items():
        assert (f"\n| {name} | yes | " if row["works"] else f"\n- `{name}`: ") in page


def test_the_fields_of_a_type() -> None:
    told = describe_type("LoHa")
    assert told.startswith("loha: chosen by --method peft --set method.type=loha\n")
    assert "method.config.r " in told
    assert "method.config.target_modules" not in told, "what --target says"
    assert describe_type("xlora") == f"xlora does not work here: {peft_types.REFUSED['xlora']}"
    assert describe_type("ia3").endswith("peftlab list methods ia3")
    with pytest.raises(UnknownNameError, match=r"unknown peft type 'lohha'"):
        describe_type("lohha")
    for name in sorted(peft_type_names()):
        assert describe_type(name)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"kind": "methods", "name": "ia4"}, UnknownNameError, r"unknown method 'ia4' \(did you mean 'ia3'"),
        ({"kind": "config", "method": "ia4"}, UnknownNameError, r"unknown method 'ia4'"),
        ({"kind": "strategies", "name": "x"}, InputError, r"takes no name; single ones are listed of methods, tasks"),
        ({"kind": "methods", "method": "lora"}, InputError, r"--method goes with config: peftlab list config --method lora"),
        ({"kind": "flags", "name": "r", "markdown": True}, InputError, r"--markdown is for the whole page"),
    ],
)  # fmt: skip
def test_what_cannot_be_listed(asked: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list_kind(**asked)  # type: ignore[arg-type]
