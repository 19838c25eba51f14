"""`ExtensionConfig`: the document's fields, checked, with what was set by hand known."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from peftlab.errors import ConfigError
from peftlab.extensions.config import ExtensionConfig

DOCUMENT = {
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "lora_target_modules": None, "layer_position": "encoder",
    "layer_initialization_scale": 0.01, "freeze_base": True, "save_directory": None,
}  # fmt: skip
OTHER = {
    "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_target_modules": ["q", "v"], "layer_position": "both",
    "layer_initialization_scale": 0.5, "freeze_base": False, "save_directory": "here",
}  # fmt: skip


def test_fields_and_defaults_are_the_documents():
    assert dataclasses.is_dataclass(ExtensionConfig)
    assert dataclasses.asdict(ExtensionConfig()) == DOCUMENT
    assert list(inspect.signature(ExtensionConfig).parameters) == [*DOCUMENT, "save_path"]


def test_by_place_and_by_name():
    assert ExtensionConfig(4, 8.0, 0.0, ["q", "v"], "both", 0.5, False, "here") == ExtensionConfig(**OTHER)
    assert ExtensionConfig(4, 8.0).set_by_hand == ("lora_r", "lora_alpha")
    assert (
        ExtensionConfig(save_path="here").save_directory
        == ExtensionConfig(save_directory="here").save_path
        == "here"
    )
    assert ExtensionConfig(save_path="here").set_by_hand == ("save_directory",)
    with pytest.raises(ConfigError, match="two names of one folder"):
        ExtensionConfig(save_directory="here", save_path="there")


def test_a_default_by_hand_is_by_hand_and_a_change_too():
    config = ExtensionConfig(lora_r=16)
    assert config.set_by_hand == ("lora_r",)
    config.layer_position = "decoder"
    config.save_path = "there"
    assert config.set_by_hand == ("lora_r", "layer_position", "save_directory")
    assert (config.save_directory, config.save_path, config.directory) == ("there", "there", Path("there"))
    assert ExtensionConfig().set_by_hand == ()
    assert ExtensionConfig().directory == Path("adapters")
    changed = dataclasses.replace(ExtensionConfig(lora_r=4), lora_alpha=8)
    assert (changed.lora_r, changed.lora_alpha, changed.set_by_hand) == (4, 8, ("lora_r", "lora_alpha"))
    assert dataclasses.replace(ExtensionConfig(save_path="here"), lora_r=2).set_by_hand == (
        "lora_r",
        "save_directory",
    )
    other = copy.deepcopy(config)
    assert other == config
    assert other.set_by_hand == config.set_by_hand


@pytest.mark.parametrize("values", [{}, {"lora_r": 16}, OTHER, {"lora_target_modules": ("q",)}])
def test_json_and_back(values):
    config = ExtensionConfig(**values)
    back = ExtensionConfig.from_json(config.to_json())
    assert back.to_dict() == config.to_dict()
    assert back.set_by_hand == config.set_by_hand
    assert back.lora_settings() == config.lora_settings()
    assert back.layer_settings() == config.layer_settings()
    assert ExtensionConfig(save_directory=Path("here")).to_dict() == {"save_directory": "here"}
    assert ExtensionConfig(lora_target_modules={"v", "q"}).to_dict() == {"lora_target_modules": ["q", "v"]}
    assert json.loads(json.dumps(config.complete())).keys() == DOCUMENT.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_r", 0), ("lora_r", 2.5), ("lora_r", True), ("lora_alpha", 0), ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")), ("lora_dropout", 1), ("lora_dropout", -0.1), ("lora_dropout", "0.1"),
        ("lora_target_modules", []), ("lora_target_modules", ""), ("lora_target_modules", ["q", ""]),
        ("lora_target_modules", 3), ("layer_position", "middle"), ("layer_position", ["encoder"]),
        ("layer_initialization_scale", -1), ("layer_initialization_scale", 2), ("layer_initialization_scale", float("nan")),
        ("freeze_base", 1), ("freeze_base", None), ("save_directory", 3), ("save_directory", ""),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_however_it_comes(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} must be .* \(given: "):
        ExtensionConfig(**{field: value})
    config = ExtensionConfig()
    with pytest.raises(ConfigError, match=field):
        setattr(config, field, value)
    assert config == ExtensionConfig()


def test_all_bad_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        ExtensionConfig(lora_r=0, freeze_base="no", layer_position="x")
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "lora_r",
        "layer_position",
        "freeze_base",
    ]


def test_unknown_fields_are_suggested():
    with pytest.raises(ConfigError, match=r"unknown field 'lora_rank' \(did you mean 'lora_r'"):
        ExtensionConfig.from_dict({"lora_rank": 3})
    with pytest.raises(ConfigError, match="unknown field 'r'"):
        ExtensionConfig().r = 3
    for text, said in (("{", "must be JSON"), ("[1]", "JSON object")):
        with pytest.raises(ConfigError, match=said):
            ExtensionConfig.from_json(text)


def test_every_field_reaches_its_method():
    config = ExtensionConfig(**OTHER)
    assert config.lora_settings() == {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("q", "v")}
    assert config.layer_settings() == {"stack": "both", "initialization": "scale", "scale": 0.5}
    assert ExtensionConfig().lora_settings() == {"rank": 16, "alpha": 32, "dropout": 0.1, "targets": "both"}
    assert ExtensionConfig().layer_settings() == {"stack": None}
    assert ExtensionConfig(layer_initialization_scale=0).layer_settings() == {"stack": None}
