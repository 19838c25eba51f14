"""The VQA document's injection and freezing: counts at real sizes on the meta device, adapters that stay trainable."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    MBartConfig,
    MBartModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import peftlab
from peftlab.errors import MethodError, MissingPeftError, TargetError
from peftlab.proof import fingerprint
from peftlab.vision_text import (
    VisionTextLoRA,
    freeze_pretrained,
    inject_lora_to_text_encoder,
    inject_lora_to_vision_encoder,
)


class Answerer(VisionTextLoRA, nn.Module):
    """A model as the document's: a vision encoder, a text encoder and a decoder, joined by a projection."""

    def __init__(self, vision: nn.Module, text: Any) -> None:
        super().__init__()
        self.vision_encoder, self.encoder, self.decoder = vision, text.encoder, text.decoder
        self.projection = nn.Linear(vision.config.hidden_size, text.config.d_model)

    def forward(self, pixels: torch.Tensor, question: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        seen = self.projection(self.vision_encoder(pixels).last_hidden_state)
        read = self.encoder(input_ids=question).last_hidden_state
        both = torch.cat([seen, read], dim=1)
        return self.decoder(input_ids=answer, encoder_hidden_states=both).last_hidden_state


def tiny() -> Answerer:
    torch.manual_seed(0)
    vision = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in _PARTS.items()}
    return Answerer(Dinov2Model(vision), MBartModel(MBartConfig(d_model=16, vocab_size=32, **sizes)))


_PARTS = {"layers": 3, "attention_heads": 2, "ffn_dim": 24}


def answer(model: Answerer) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        ids = torch.arange(4)[None]
        return model(torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8), ids, ids)


def test_the_counts_at_real_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        vision = Dinov2Model(Dinov2Config())
        text = MBartModel(MBartConfig(vocab_size=40_031, d_model=1024)).encoder
    inject_lora_to_vision_encoder(vision)
    inject_lora_to_text_encoder(text)
    counts = freeze_pretrained({"vision_encoder": vision, "encoder": text})
    assert counts == {"vision_encoder": 442_368, "encoder": 1_179_648}
    assert counts == {
        "vision_encoder": 12 * 3 * 8 * (768 + 768),
        "encoder": 12 * 3 * 16 * (1024 + 1024),
    }
    said = capsys.readouterr().out
    assert "[LoRA] Vision - Trainable: 442,368 (0.51%)" in said
    assert "Text encoder: FROZEN (base) + PEFT LoRA (1.18M params) on 12 layers" in said


def test_both_adapters_train_after_freezing_and_the_bases_keep_their_bits() -> None:
    model = tiny()
    model.projection.requires_grad_(False)
    before = answer(model)
    model.inject_lora()
    assert torch.equal(answer(model), before), "B starts at zero"
    model.freeze_pretrained(unfreeze_decoder=False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"vision_encoder", "encoder"}
    assert all(".lora_" in name for name in trained)
    rest = {name: fingerprint(p) for name, p in model.named_parameters() if name not in trained}
    marks = {name: fingerprint(p) for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    ids = torch.arange(4)[None]
    for _ in range(2):  # A learns once B has moved
        optimizer.zero_grad()
        model(torch.ones(1, 3, 8, 8), ids, ids).pow(3).sum().backward()
        optimizer.step()
    assert not [name for name, p in trained.items() if fingerprint(p) == marks[name]]
    assert all(fingerprint(p) == rest[name] for name, p in model.named_parameters() if name in rest)


@pytest.mark.parametrize(("layers", "decoder"), [(None, True), (0, False), (2, True), (3, False)])
@pytest.mark.parametrize("with_lora", [True, False])
def test_last_layers_and_decoder_are_unfrozen_as_asked(
    layers: int | None, decoder: bool, with_lora: bool
) -> None:
    model = tiny()
    if with_lora:
        model.inject_lora()
    counts = model.freeze_pretrained(layers, decoder)
    wanted = (0 if with_lora else 3) if layers is None else layers
    text = model.encoder.get_base_model() if with_lora else model.encoder
    unfrozen = [
        i
        for i, block in enumerate(text.layers)
        if all(p.requires_grad for name, p in block.named_parameters())
    ]
    assert unfrozen == list(range(3 - wanted, 3))
    assert all(p.requires_grad for p in model.decoder.parameters()) is decoder
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    assert len(adapters) == (36 if with_lora else 0)
    assert all(p.requires_grad for p in adapters)
    assert counts["encoder"] == sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def test_names_of_layers_do_not_matter() -> None:
    """SigLIP, whose own later version in the document's code was given up as not supported by peft."""
    config = SiglipVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        intermediate_size=24,
    )
    encoder = inject_lora_to_vision_encoder(SiglipVisionModel(config), r=4, show=lambda _: None)
    encoder(pixel_values=torch.randn(2, 3, 8, 8)).last_hidden_state.sum().backward()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * 2
    assert all(p.grad is not None for p in trained)
    assert encoder.peft_config["default"].task_type is None


def test_without_peft_there_is_no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"REQUIRED for LoRA!\nInstall with: pip install peft"):
        tiny().inject_lora()
    with pytest.raises(MissingPeftError):
        inject_lora_to_text_encoder(tiny().encoder)
    tiny().freeze_pretrained()  # needs none


def test_bad_input_changes_nothing() -> None:
    model = tiny()
    model.inject_lora()
    model.freeze_pretrained(1)
    states = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(MethodError, match=r"adapters already"):
        model.inject_lora()
    with pytest.raises(MethodError, match=r"unfreeze_encoder_layers is 4, this encoder has 3 layers"):
        model.freeze_pretrained(4)
    with pytest.raises(MethodError, match=r"0 or more"):
        model.freeze_pretrained(-1)
    with pytest.raises(MethodError, match=r"not head"):
        freeze_pretrained({"head": nn.Linear(2, 2)})
    with pytest.raises(MethodError, match=r"a number of layers, 0 or more, not 'all'"):
        model.freeze_pretrained("all")
    with pytest.raises(MethodError, match=r"give the parts by name"):
        freeze_pretrained([model.encoder])
    with pytest.raises(MethodError, match=r"r of 1 or more"):
        inject_lora_to_text_encoder(tiny().encoder, r=0)
    with pytest.raises(MethodError, match=r"not 'vit'"):
        inject_lora_to_vision_encoder("vit")
    with pytest.raises(MethodError, match=r"has no vision_encoder"):
        VisionTextLoRA().inject_lora()
    with pytest.raises((TargetError, peftlab.ModelError)):
        inject_lora_to_vision_encoder(nn.Linear(2, 2))
    assert states == {name: p.requires_grad for name, p in model.named_parameters()}


def test_an_encoder_of_fewer_layers_than_the_default_trains_them_all() -> None:
    sizes = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in _PARTS.items()}
    encoder = MBartModel(MBartConfig(d_model=16, vocab_size=32, **sizes | {"encoder_layers": 2})).encoder
    lines: list[str] = []
    counts = freeze_pretrained({"encoder": encoder}, show=lines.append)
    assert counts == {"encoder": sum(p.numel() for p in encoder.layers.parameters())}
    assert not encoder.embed_tokens.weight.requires_grad
    assert "last 2 layers TRAINABLE" in lines[0]
    with pytest.raises(MethodError, match=r"unfreeze_encoder_layers is 3, this encoder has 2 layers"):
        freeze_pretrained({"encoder": encoder}, unfreeze_encoder_layers=3)


def test_nothing_assigns_a_forward() -> None:
    """No forward is patched, neither by assignment nor by setattr."""
    found = []
    for path in Path(peftlab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Attribute) and target.attr == "forward" for target in targets):
                found.append(f"{path.name}:{node.lineno}")
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id == "setattr" and "forward" in ast.dump(node.args[1]):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
