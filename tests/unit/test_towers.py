"""Several adapters on the towers of one model: own settings, trained together, saved apart, the base back to the bit."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import PeftModel
from safetensors.torch import load_file

import tiny_models
import whole_runs
from peftlab.attaching.towers import attach_adapters
from peftlab.config import AdapterSettings, build_config
from peftlab.errors import ConfigError, MethodError, PeftlabError, TargetError
from peftlab.execute import execute, plan
from peftlab.exporting import export_adapter
from peftlab.mapping import map_model
from peftlab.proof import fingerprint
from peftlab.store import load, open_run
from tiny_runs import same

VISION = {"rank": 2, "alpha": 4, "targets": ["attention.query", "attention.key", "attention.value"]}
TEXT = {"rank": 4, "alpha": 32, "dropout": 0.3, "targets": "both"}


def _vision_config() -> Any:
    return T.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )


def llava() -> Any:
    torch.manual_seed(0)
    text = T.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = T.LlavaConfig(
        vision_config=_vision_config(), text_config=text, image_token_index=31, vision_feature_layer=-1
    )
    return T.LlavaForConditionalGeneration(config)


def describing() -> Any:
    torch.manual_seed(0)
    vision = T.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = T.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, add_cross_attention=True
    )
    return T.VisionEncoderDecoderModel(
        T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    )


def pictures() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[31, 31, 31, 31, 5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.ones(1, 3, 8, 8)}


def adapters(**scopes: dict[str, Any]) -> list[AdapterSettings]:
    return [AdapterSettings(scope=scope, method="lora", settings=given) for scope, given in scopes.items()]


BOTH = {"vision_tower": VISION, "language_model": TEXT}


def test_towers_are_proved_each_by_itself() -> None:
    """A vision tower does not run when the whole is given text alone."""
    family = map_model(llava())
    assert dict(family.stacks) == {"vision_tower": 3, "language_model": 2}
    assert family.unproven == {}
    roles = {site.role for site in family.sites if site.stack == "vision_tower" and site.linear}
    assert {"attention.query", "attention.output", "mlp.up", "mlp.down"} <= roles
    family = map_model(describing())
    assert dict(family.stacks) == {"encoder": 2, "decoder": 2}
    assert {path.split(".")[0] for path in family.unproven} <= {"decoder"}, "cross-attention is not shown"


def test_each_tower_has_its_own_settings_and_all_train() -> None:
    base = llava().train()
    marks = {name: fingerprint(p) for name, p in base.named_parameters()}
    attached = attach_adapters(base, map_model(base), adapters(**BOTH), head="causal", seed=1)
    parameters = attached.parameters()
    sizes = {name: sum(p.numel() for n, p in parameters.items() if name in n.split(".")) for name in BOTH}
    assert sizes == {
        "vision_tower": 3 * 3 * 2 * (16 + 16),
        "language_model": 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24)),
    }
    layers = dict(attached.model.named_modules())
    query = layers["base_model.model.model.language_model.layers.0.self_attn.q_proj"]
    assert (query.r, query.scaling, query.lora_dropout["language_model"].p) == (
        {"language_model": 4}, {"language_model": 8.0}, 0.3,
    )  # fmt: skip
    assert all(p.requires_grad for p in parameters.values())
    assert {n for n, p in attached.model.named_parameters() if p.requires_grad} == parameters.keys()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    before = {name: fingerprint(p) for name, p in parameters.items()}
    for _ in range(2):
        optimizer.zero_grad()
        attached.model(**pictures()).logits.pow(2).sum().backward()
        optimizer.step()
    assert [name for name, p in parameters.items() if fingerprint(p) == before[name]] == []
    back = attached.remove()
    assert back is base
    assert {name: fingerprint(p) for name, p in back.named_parameters()} == marks


def test_switched_off_saved_and_put_back(tmp_path: Path) -> None:
    base, fresh = llava().eval(), llava().eval()
    bare = base(**pictures()).logits
    attached = attach_adapters(base, map_model(base), adapters(**BOTH), head="causal", seed=1)
    for number, parameter in enumerate(attached.parameters().values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    moved = attached.model.eval()(**pictures()).logits
    assert not torch.allclose(moved, bare)
    with attached.disabled():
        assert torch.equal(attached.model(**pictures()).logits, bare)
    assert torch.equal(attached.model(**pictures()).logits, moved)
    attached.save(tmp_path)
    again = attach_adapters(fresh, map_model(fresh), adapters(**BOTH), head="causal", seed=2)
    again.load_saved(tmp_path)
    assert same(again.tensors(), attached.tensors())
    assert torch.equal(again.model.eval()(**pictures()).logits, moved)
    theirs = PeftModel.from_pretrained(llava().eval(), tmp_path / "vision_tower", adapter_name="vision_tower")
    theirs.load_adapter(tmp_path / "language_model", adapter_name="language_model")
    theirs.base_model.set_adapter(["vision_tower", "language_model"])
    assert torch.equal(theirs(**pictures()).logits, moved), "others load it with peft alone"
    merged = attached.merge()
    torch.testing.assert_close(merged(**pictures()).logits, moved, rtol=1e-4, atol=1e-5)


def test_a_module_can_be_a_scope(tmp_path: Path) -> None:
    scopes = {"model.vision_tower.encoder": VISION, "language_model": TEXT}
    base = llava()
    attached = attach_adapters(base, map_model(base), adapters(**scopes), head="causal", seed=1)
    attached.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model_vision_tower_encoder", "language_model"}


def test_one_tower_alone_is_called_as_every_adapter() -> None:
    base = llava()
    attached = attach_adapters(base, map_model(base), adapters(vision_tower=VISION), head="causal", seed=1)
    assert len(attached.parameters()) == 3 * 3 * 2
    assert all(".vision_tower." in name and ".default." in name for name in attached.parameters())


def test_an_encoder_decoder_has_two_towers() -> None:
    base = tiny_models.build("t5")
    family = map_model(base)
    assert {stack: family.tower(stack) for stack in family.stacks} == {
        "encoder": "encoder",
        "decoder": "decoder",
    }
    both = adapters(encoder={"rank": 2, "targets": "attention"}, decoder={"rank": 3, "targets": "mlp"})
    attached = attach_adapters(base, family, both, head="seq2seq", seed=1)
    assert attached.model.generate(**tiny_models.inputs("t5"), max_new_tokens=2).shape[0] == 2
    assert {attached.family.locate(name).stack for name in attached.parameters()} == {"encoder", "decoder"}


REFUSED: dict[str, tuple[list[AdapterSettings], type[PeftlabError], str]] = {
    "whole and tower": (
        [*adapters(vision_tower=VISION), AdapterSettings(method="ia3")],
        MethodError,
        r"ia3 on the whole model cannot be combined with lora on vision_tower.*hybrid",
    ),
    "one inside the other": (
        adapters(vision_tower=VISION, **{"model.vision_tower.encoder": TEXT}),
        MethodError,
        r"cannot be combined.*share layers",
    ),
    "misspelt": (adapters(visoin_tower=VISION), TargetError, r"did you mean 'vision_tower'"),
    "not in a tower": (
        [AdapterSettings(scope="vision_tower", method="prompt_tuning")],
        MethodError,
        r"adapts the whole model; in a tower use lora",
    ),
    "two methods": (
        [*adapters(vision_tower=VISION), AdapterSettings(scope="language_model", method="bitfit")],
        MethodError,
        r"bitfit on language_model.*cannot be combined|has no scope 'language_model'",
    ),
    "nothing there": (
        adapters(language_model=TEXT, vision_tower={"targets": "mlp.gate"}),
        TargetError,
        r"'mlp.gate' matches nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_by_name_and_leaves_nothing(case: str) -> None:
    given, kind, says = REFUSED[case]
    base = llava()
    before = [(name, id(p), p.requires_grad) for name, p in base.named_parameters()]
    with pytest.raises(kind, match=says):
        attach_adapters(base, map_model(base), given, head="causal", seed=1)
    assert [(name, id(p), p.requires_grad) for name, p in base.named_parameters()] == before
    with pytest.raises(TargetError, match=r"has one stack; leave the scope out"):
        map_model(tiny_models.build("gpt2")).within("layers")


def test_a_scope_has_one_adapter() -> None:
    twice = [{"scope": "encoder", "method": "lora"}, {"scope": "encoder", "method": "lora"}]
    with pytest.raises(ConfigError, match=r"each scope has one, encoder has several"):
        build_config({"adapters": twice})


def test_a_whole_run_with_two_towers(tmp_path: Path) -> None:
    """Planned, trained in two phases and proved, saved, loaded, asked, exported, resumed: as with one adapter."""
    values: Any = whole_runs.make_values(tmp_path, evaluation={"num_samples": 2, "max_new_tokens": 2})
    whole_runs.save_byte_model(tmp_path / "t5", "t5")
    del values["method"], values["schedule"]
    values["model"]["name"] = str(tmp_path / "t5")
    values["schedule"] = {"phases": [{"groups": ["attention"], "steps": 3}, {"groups": ["mlp"]}]}
    values["training"] |= {"max_steps": 6}
    values["adapters"] = [
        {"scope": "encoder", "method": "lora", "settings": {"rank": 2, "targets": "both"}},
        {"scope": "decoder", "method": "lora", "settings": {"rank": 4, "targets": "both"}},
    ]
    config = build_config(values)
    planned = plan(config)
    done = execute(config, show=lambda line: None)
    summary = done.summary()
    assert summary["counts"]["trainable_parameters"] == planned["parameters"]["trainable"]
    assert all(phase["proved"] for phase in summary["phases"])
    opened = open_run(str(done.path), directory=tmp_path)
    model, tokenizer = load(done.path)
    batch = dict(tokenizer("name[Aromi]", return_tensors="pt"))
    batch["decoder_input_ids"] = batch["input_ids"][:, :3]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, opened.model(**batch).logits)
        with opened.adapter(on=False):
            assert not torch.equal(model(**batch).logits, opened.model(**batch).logits)
    exported = export_adapter(done.path, output=tmp_path / "exported")
    theirs = PeftModel.from_pretrained(
        T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5"), exported / "encoder", adapter_name="encoder"
    )
    theirs.load_adapter(exported / "decoder", adapter_name="decoder")
    theirs.base_model.set_adapter(["encoder", "decoder"])
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**batch).logits, model(**batch).logits)
    folders = {path.parent.name for path in done.final_model.rglob("adapter_config.json")}
    assert folders == {"encoder", "decoder"}
    assert "encoder" in done.path.name
    assert len(list(itertools.chain(done.final_model.glob("*/adapter_model.safetensors")))) == 2
    files = sorted(done.final_model.rglob("adapter_model.safetensors"))
    before = [load_file(file) for file in files]
    for name in ("DONE", "results_summary.json", "checkpoints/finished.json"):
        (done.path / name).unlink()
    for folder in (done.final_model, done.checkpoints / "checkpoint-6"):
        shutil.rmtree(folder)
    execute(config, resume=done.path, show=lambda line: None)
    assert all(same(load_file(file), tensors) for file, tensors in zip(files, before, strict=True))
