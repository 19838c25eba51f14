"""The VQA document's snippets: what runs, runs; the manual code that it deletes is the reference that peft must equal."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import peftlab
from peftlab import VisionTextLoRA

DOCUMENT = Path(__file__).parents[3] / "shared" / "seeds" / "003_81664c351a0d06b8.txt"

ONE_LINER = """# One-liner!
self.vision_encoder = get_peft_model(self.vision_encoder, lora_config)"""
MANUAL = """# Complex forward hook injection
def make_lora_forward(original_forward, lora_layer):
    def forward_with_lora(x):
        base_out = original_forward(x)
        lora_out = lora_layer(x)
        return base_out + lora_out"""
FINAL = ("_inject_lora_to_vision_encoder", "_inject_lora_to_text_encoder", "freeze_pretrained")
DELETED = ("_inject_lora_manual", "_count_lora_params", "LoRALayer")


class Model(VisionTextLoRA, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        self.vision_encoder = Dinov2Model(config).double()


class ManualLoRA(nn.Module):
    """The matrix mathematics that the document deletes."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x @ self.a.T @ self.b.T)


def test_the_snippets_stand_in_the_document() -> None:
    if not DOCUMENT.exists():
        pytest.skip(f"needs {DOCUMENT}, which is not part of the repository")
    text = DOCUMENT.read_text(encoding="utf-8")
    assert ONE_LINER in text
    assert MANUAL in text
    assert all(name in text for name in FINAL + DELETED)
    assert "pip install peft" in text


def test_the_one_liner_is_what_injection_does() -> None:
    by_hand, injected = Model(), Model()
    injected.use_text_lora = False
    torch.manual_seed(1)
    injected.inject_lora()
    names = {"self": by_hand, "lora_config": injected.vision_encoder.peft_config["default"]}
    torch.manual_seed(1)
    exec(f"from peft import get_peft_model\n{ONE_LINER}", names)
    assert isinstance(injected.vision_encoder, PeftModel)
    theirs = dict(by_hand.vision_encoder.named_parameters())
    ours = dict(injected.vision_encoder.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_final_state_has_what_the_document_says_and_lacks_what_it_deletes() -> None:
    assert all(inspect.isfunction(getattr(VisionTextLoRA, name)) for name in FINAL)
    assert not any(hasattr(VisionTextLoRA, name) for name in DELETED)
    source = inspect.getsource(peftlab.vision_text)
    assert not re.search(r"register_forward|\.forward\b|matmul|@ ", source)


def test_the_deleted_manual_code_and_peft_train_alike() -> None:
    """Forward, gradients and three AdamW steps in float64, dropout off: "same performance as manual"."""
    model = Model()
    manual = copy.deepcopy(model.vision_encoder)
    model.use_text_lora, model.vision_lora_dropout = False, 0.0
    model.inject_lora()
    ours = {name: p for name, p in model.vision_encoder.named_parameters() if p.requires_grad}
    names: dict[str, Callable[..., Callable[..., torch.Tensor]]] = {}
    exec(f"{MANUAL}\n    return forward_with_lora", names)
    theirs = {}
    manual.requires_grad_(False)
    for name in [
        n.removesuffix(".lora_A.default.weight") for n in ours if n.endswith(".lora_A.default.weight")
    ]:
        a, b = (ours[f"{name}.lora_{part}.default.weight"] for part in "AB")
        lora = ManualLoRA(a.detach(), b.detach(), scale=16 / 8)
        linear = manual.get_submodule(name.removeprefix("base_model.model."))
        linear.forward = names["make_lora_forward"](linear.forward, lora)
        theirs |= {f"{name}.lora_A.default.weight": lora.a, f"{name}.lora_B.default.weight": lora.b}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 12
    optimizers = [torch.optim.AdamW(list(named.values()), lr=1e-2) for named in (ours, theirs)]
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        outputs = [vision(pixels).last_hidden_state for vision in (model.vision_encoder, manual)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.pow(3).sum().backward()
        for name in ours:
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-10)
        for optimizer in optimizers:
            optimizer.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)
