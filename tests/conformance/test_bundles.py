"""What every method's bundle must keep: a new process answers alike, and damage loads nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_bundles
import tiny_models
from peftlab import restoring
from peftlab.catalog import METHODS
from peftlab.errors import CheckpointError, ConfigError, InputError, MethodError, PeftlabError
from peftlab.exporting import export_adapter
from peftlab.importing.adapter import import_adapter
from peftlab.store import attach_saved, load
from tiny_bundles import CASES, Kept, answers, change_manifest, change_tensors, copy_of, differences, state_of

LOADED = [pytest.param(name, file, id=f"{name}-{file}") for name in CASES for file in CASES[name].weights]
EXPORTED = [name for name, case in CASES.items() if case.by_peft]
MADE = ("p_tuning", "p_tuning_lstm", "prefix_tuning")
"""Bundles of virtual tokens and prefixes that a network makes."""
SOURCE = Path(__file__).parents[2] / "src"

ELSEWHERE = """
import json, sys
from pathlib import Path
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

torch.set_num_threads(1)
asked = json.loads(Path(sys.argv[1]).read_text())
found = {}


def tensors(case):
    return {key: torch.tensor(value) for key, value in case["inputs"].items()}


for name, case in asked.items():
    if case["exported"]:
        base = getattr(transformers, case["class"]).from_pretrained(case["base"])
        model = PeftModel.from_pretrained(base, case["exported"]).eval()
        with torch.no_grad():
            found[f"peft.{name}"] = model(**tensors(case)).logits
assert "peftlab" not in sys.modules
import peftlab
for name, case in asked.items():
    model, _ = peftlab.load(case["bundle"], device="cpu")
    assert not model.training
    with torch.no_grad():
        found[f"peftlab.{name}"] = model(**tensors(case)).logits
save_file({name: logits.contiguous() for name, logits in found.items()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    return tiny_bundles.make_all(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def elsewhere(kept: dict[str, Kept], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the bundles' models answer in one process of their own: loaded by peft alone, then by peftlab."""
    folder = tmp_path_factory.mktemp("elsewhere")
    asked = {}
    for name, one in kept.items():
        exported = export_adapter(one.path, output=folder / "plain") if one.case.by_peft else None
        asked[name] = {
            "bundle": str(one.path),
            "base": str(one.base),
            "exported": exported and str(exported),
            "class": type(tiny_models.build(one.case.model)).__name__,
            "inputs": {key: value.tolist() for key, value in tiny_models.inputs(one.case.model).items()},
        }
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ELSEWHERE, str(folder / "asked.json"), str(folder / "found")],
        capture_output=True, text=True, check=False, timeout=240, env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "found")


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES.values()} == set(METHODS.names())


# -- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_answers_alike(
    name: str, kept: dict[str, Kept], elsewhere: dict[str, torch.Tensor]
) -> None:
    bare = answers(tiny_models.build(CASES[name].model), CASES[name].model)
    own = kept[name].logits
    assert own.shape != bare.shape or not torch.equal(own, bare), "the adapter has an effect"
    assert torch.equal(elsewhere[f"peftlab.{name}"], own)


def compare(name: str, found: torch.Tensor, own: torch.Tensor) -> None:
    """Bit-equal; but where a network makes the prompt, peft has its output for one row, and here it runs on all rows."""
    if name in MADE:
        torch.testing.assert_close(found, own, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, own)


@pytest.mark.parametrize("name", EXPORTED)
def test_plain_peft_answers_alike(
    name: str, kept: dict[str, Kept], elsewhere: dict[str, torch.Tensor]
) -> None:
    own = kept[name].logits
    compare(name, elsewhere[f"peft.{name}"], own)


@pytest.mark.parametrize("name", EXPORTED)
def test_export_and_import_give_back_the_same(name: str, kept: dict[str, Kept], tmp_path: Path) -> None:
    one = kept[name]
    plain = export_adapter(one.path, output=tmp_path, name="plain")
    assert sorted(file.name for file in plain.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    done = import_adapter(plain, base=str(one.base), output=tmp_path, name="back", labels=(
        tiny_bundles.LABELS if tiny_models.HEADS[one.case.model] == "classification" else ()
    ))  # fmt: skip
    again = export_adapter(done.path, output=tmp_path, name="again")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (plain, again)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    model, _ = load(done.path, device="cpu")
    compare(name, answers(model, one.case.model), one.logits)


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXPORTED])
def test_what_peft_cannot_load_is_not_exported(name: str, kept: dict[str, Kept], tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"not exported: .*peftlab\.load"):
        export_adapter(kept[name].path, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- damage: it is refused, it is named, and nothing is loaded -------------------------------------------------------


class Live:
    """A live base that refuses one bundle after the other and stays as it was."""

    def __init__(self, model: str) -> None:
        self.model, self.base = model, tiny_models.build(model)
        for number, parameter in enumerate(self.base.parameters()):
            parameter.requires_grad_(bool(number % 2))
        self.before, self.answered = state_of(self.base), answers(self.base, model)

    def refuse(self, path: Path, expected: type[PeftlabError], *matches: str) -> None:
        with pytest.raises(expected) as caught:
            attach_saved(self.base, path)
        for match in matches:
            assert re.search(match, str(caught.value)), str(caught.value)
        assert differences(self.before, state_of(self.base)) == []
        assert torch.equal(answers(self.base, self.model), self.answered)


def change_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last tensor lost, the one before of another shape where there is one, and one too many."""
    *others, _ = sorted(tensors)
    changed = {name: tensors[name] for name in others} | {"nobodys.weight": torch.zeros(2)}
    return changed | {name: torch.cat([tensors[name].reshape(-1), torch.zeros(1)]) for name in others[-1:]}


@pytest.mark.parametrize(("name", "file"), LOADED)
def test_damage_is_named_and_loads_nothing(
    name: str, file: str, kept: dict[str, Kept], tmp_path: Path
) -> None:
    """A flipped byte, a missing file, a file cut short, and other tensors under checksums that fit."""
    bundle, live = copy_of(kept[name], tmp_path), Live(CASES[name].model)
    content, names = (bundle / file).read_bytes(), sorted(load_file(bundle / file))
    (bundle / file).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    live.refuse(bundle, CheckpointError, rf"is damaged: {file} not as written")
    (bundle / file).unlink()
    live.refuse(bundle, CheckpointError, rf"is damaged: {file} not as written")
    tiny_bundles.sum_again(bundle)
    live.refuse(bundle, CheckpointError, r"bundle")
    (bundle / file).write_bytes(content[: len(content) * 2 // 3])
    tiny_bundles.sum_again(bundle)
    live.refuse(bundle, CheckpointError, r"cannot be loaded")
    (bundle / file).write_bytes(content)
    change_tensors(bundle, file, change_all)
    live.refuse(bundle, CheckpointError, r"nobodys\.weight", *map(re.escape, names[-2:]))
    change_tensors(bundle, file, lambda tensors: {n: t for n, t in tensors.items() if n != "nobodys.weight"})
    live.refuse(bundle, CheckpointError, re.escape(names[-1]))
    (bundle / file).write_bytes(content)
    tiny_bundles.sum_again(bundle)
    change_manifest(bundle, lambda manifest: manifest.update(version=99))
    live.refuse(bundle, CheckpointError, r"manifest version 99, this peftlab reads 1")
    change_manifest(bundle, lambda manifest: manifest.update(version=1, settings={"nobodys": 1}))
    live.refuse(bundle, ConfigError, r"nobodys")
    change_manifest(bundle, lambda manifest: manifest.update(settings=7, head="tail"))
    live.refuse(bundle, CheckpointError, r"no usable settings")


@pytest.mark.parametrize("name", CASES)
def test_another_base(name: str, kept: dict[str, Kept], tmp_path: Path) -> None:
    one = kept[name]
    other = tiny_models.save_model(tmp_path / "other", one.case.model)
    base = type(tiny_models.build(one.case.model)).from_pretrained(other)
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1e-3
    base.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"trained on a base with other weights"):
        load(one.path, base=str(other), device="cpu")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[1]"),
        ("manifest.json", '{"version": 1}'),
        ("checksums.json", "[1]"),
    ],
)
def test_a_manifest_that_says_nothing(file: str, content: str, kept: dict[str, Kept], tmp_path: Path) -> None:
    bundle = copy_of(kept["lora"], tmp_path)
    (bundle / file).write_text(content, encoding="utf-8")
    if file == "manifest.json":
        tiny_bundles.sum_again(bundle)
    Live("llama").refuse(bundle, CheckpointError, r"cannot be read|keys and values|no usable")


def test_a_bundle_cannot_bring_its_own_code(
    kept: dict[str, Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_of(kept["lora"], tmp_path)
    (bundle / "evil.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    change_manifest(bundle, lambda manifest: manifest.update(method="bundle.evil"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Live("llama").refuse(bundle, CheckpointError, r"holds code \(evil\.py\)")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    Live("llama").refuse(tmp_path, InputError, r"is not a peftlab bundle")


def test_companion_a_load_that_leaves_the_adapter_is_noticed(
    kept: dict[str, Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `load_whole` the failed load leaves the adapter on the base, and `refuse` sees it."""
    from peftlab import store

    monkeypatch.setattr(store, "load_whole", lambda attachment, folder: attachment.load_saved(folder))
    bundle = copy_of(kept["lora"], tmp_path)
    change_tensors(bundle, "adapter_model.safetensors", change_all)
    with pytest.raises(AssertionError):
        Live("llama").refuse(bundle, CheckpointError, "nobodys")
    assert restoring.load_whole is not store.load_whole
