"""Plain peft folders become bundles that answer as peft itself does; what cannot be expressed or does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from foreign_adapters import (
    ADAPTERS,
    TENSORS,
    Made,
    configure,
    copied,
    rename,
    with_adapters_name,
)
from peftlab.errors import (
    CheckpointError,
    ConfigError,
    PeftlabError,
)
from peftlab.importing.adapter import import_adapter
from peftlab.store import load, read_manifest
from tiny_bundles import answers


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def refuse(
    folder: Path, base: Path, error: type[PeftlabError], match: str, tmp_path: Path, **asked: Any
) -> None:
    with pytest.raises(error, match=match):
        import_adapter(folder, base=str(base), output=tmp_path / "refused", **asked)
    assert not (tmp_path / "refused").exists() or list((tmp_path / "refused").iterdir()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_answers_as_peft_does(name: str, made: Made, tmp_path: Path) -> None:
    model, _, method = ADAPTERS[name]
    folder, base, expected = made.get(name)
    bare = answers(tiny_models.build(model), model)
    assert expected.shape != bare.shape or not torch.equal(expected, bare), "the adapter has an effect"
    done = import_adapter(folder, base=str(base), output=tmp_path, name="mine")
    assert done.method == method
    loaded, _ = load(done.path, device="cpu")
    assert torch.equal(answers(loaded, model), expected)
    manifest = read_manifest(done.path)
    assert manifest["origin"].startswith(f"a peft folder ({name}, tensors sha256 ")
    assert manifest["counts"]["parameters"] == done.num_parameters
    card = (done.path / "README.md").read_text(encoding="utf-8")
    assert "Imported from a peft folder" in card
    assert "Prompt template" not in card


# -- layouts of other versions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("names", lambda name: name.removeprefix("base_model.model."), id="without_prefix"),
        pytest.param("names", with_adapters_name, id="with_the_adapters_name"),
        pytest.param(
            "names", lambda name: with_adapters_name(name).removeprefix("base_model.model."), id="both"
        ),
        pytest.param("dora", with_adapters_name, id="classifier"),
        pytest.param(
            "dora",
            lambda name: name.replace("model.classifier.", "model.classifier.modules_to_save.default."),
            id="modules_to_save",
        ),
        pytest.param("dora", lambda name: name.replace("_vector", "_vector.weight"), id="magnitude"),
        pytest.param(
            "prompt_classes", lambda name: name.removeprefix("base_model."), id="prompt_without_prefix"
        ),
    ],
)
def test_names_of_other_versions(name: str, change: Callable[[str], str], made: Made, tmp_path: Path) -> None:
    folder, base, expected = copied(made, name, tmp_path)
    before = set(load_file(folder / TENSORS))
    rename(folder, change)
    assert set(load_file(folder / TENSORS)) != before
    done = import_adapter(folder, base=str(base), output=tmp_path / "out")
    loaded, _ = load(done.path, device="cpu")
    assert torch.equal(answers(loaded, ADAPTERS[name][0]), expected)


def test_two_names_for_one_tensor(made: Made, tmp_path: Path) -> None:
    folder, base, _ = copied(made, "names", tmp_path)
    tensors = load_file(folder / TENSORS)
    first = min(tensors)
    save_file({**tensors, with_adapters_name(first): tensors[first] + 1}, folder / TENSORS)
    refuse(folder, base, CheckpointError, r"twice, with other values", tmp_path)


def test_fields_that_this_peft_does_not_know(made: Made, tmp_path: Path) -> None:
    folder, base, expected = copied(made, "names", tmp_path)
    configure(folder, use_dawn=False, dusk_config=None, dusk_names=[])
    done = import_adapter(folder, base=str(base), output=tmp_path / "out")
    configure(folder, use_dawn=True, dusk_rank=3)
    refuse(folder, base, ConfigError, r"dusk_rank=3, use_dawn=True; this peft does not know", tmp_path)
    done = import_adapter(
        folder, base=str(base), output=tmp_path / "out", name="again", ignored=["use_dawn", "dusk_rank"]
    )
    loaded, _ = load(done.path, device="cpu")
    assert torch.equal(answers(loaded, "llama"), expected)
