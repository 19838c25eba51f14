"""State dicts of loralib: the same logits as W0 + (alpha / r) B A by hand, merged layers among them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tiny_models
from peftlab.errors import CheckpointError, ConfigError, InputError, PeftlabError
from peftlab.importing.adapter import import_adapter, put_on, read_foreign
from peftlab.store import load, read_manifest

REAL = "roberta_base_lora_mnli.bin"
ALPHA = 16.0
"""What loralib's own script trains RoBERTa base on MNLI with."""


def roberta(**sizes: Any) -> Any:
    """A random RoBERTa with three classes, in evaluation mode."""
    config = transformers.RobertaConfig(
        **{
            "vocab_size": tiny_models.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 24, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": 0,
        }
        | sizes
    )  # fmt: skip
    torch.manual_seed(0)
    return tiny_models.randomise(transformers.RobertaForSequenceClassification(config)).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_models.tokenizer(closes=1, opens=1).save_pretrained(folder)
    return folder


def theirs(model: Any, rank: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """A state dict in loralib's layout: query and value of every layer, and the head."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if name.endswith(("attention.self.query", "attention.self.value")):
            found[f"{name}.lora_A"] = 0.3 * torch.randn(rank, module.in_features, generator=source)
            found[f"{name}.lora_B"] = 0.3 * torch.randn(module.out_features, rank, generator=source)
    for name, tensor in model.classifier.state_dict().items():
        found[f"classifier.{name}"] = tensor + 0.1 * torch.randn(tensor.shape, generator=source)
    return found


@torch.no_grad()
def by_hand(model: Any, tensors: dict[str, torch.Tensor], alpha: float) -> Any:
    """The model with W0 + (alpha / r) B A, and the head as it was trained."""
    for name in [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]:
        a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        weight = model.get_submodule(name).weight
        weight += (alpha / a.shape[0]) * b.to(weight) @ a.to(weight)
    for name, tensor in tensors.items():
        if name.startswith("classifier."):
            model.get_parameter(name).copy_(tensor)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("alpha", [3.0, 16.0])
def test_it_answers_as_the_formula_says(alpha: float, tmp_path: Path) -> None:
    tensors = theirs(roberta())
    torch.save(tensors, tmp_path / "mine.pt")
    foreign = read_foreign(tmp_path / "mine.pt", alpha=alpha, torch_file=True)
    translation, attachment = put_on(foreign, roberta().double(), SimpleNamespace(head="classification"))
    expected = logits(by_hand(roberta().double(), tensors, alpha))
    torch.testing.assert_close(logits(attachment.model.eval()), expected, rtol=0, atol=1e-12)
    assert translation.settings["targets"] == "attention_qv"
    assert (logits(by_hand(roberta().double(), tensors, 1.01 * alpha)) - expected).abs().max() > 1e-6


def test_it_becomes_a_bundle(tmp_path: Path) -> None:
    base = saved(roberta(), tmp_path / "base")
    tensors = theirs(roberta())
    torch.save(tensors, tmp_path / "mnli-r3.bin")
    done = import_adapter(
        tmp_path / "mnli-r3.bin", base=str(base), output=tmp_path, labels=["a", "b", "c"], alpha=ALPHA, torch_file=True
    )  # fmt: skip
    assert done.path == tmp_path / "mnli-r3"
    assert any("alpha 16 was given and is not in the file" in note for note in done.notes)
    model, _ = load(done.path, device="cpu")
    torch.testing.assert_close(logits(model), logits(by_hand(roberta(), tensors, ALPHA)), rtol=0, atol=1e-5)
    manifest = read_manifest(done.path)
    assert manifest["labels"] == ["a", "b", "c"]
    assert manifest["origin"].startswith("a state dict of loralib (mnli-r3.bin, tensors sha256 ")


def test_it_may_be_safetensors_and_without_the_bases_prefix(tmp_path: Path) -> None:
    tensors = theirs(roberta())
    short = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}
    save_file(short, tmp_path / "mine.safetensors")
    _, attachment = put_on(
        read_foreign(tmp_path / "mine.safetensors", alpha=2),
        roberta().double(),
        SimpleNamespace(head="classification"),
    )
    expected = logits(by_hand(roberta().double(), tensors, 2))
    torch.testing.assert_close(logits(attachment.model.eval()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "parts", [("query", "value"), ("value", "query"), ("key",), ("query", "key", "value")]
)
def test_merged_layers(parts: tuple[str, ...], tmp_path: Path) -> None:
    """GPT-2's fused layer: each part has an A and a B of its own, a grouped convolution in loralib."""
    rank, alpha, width = 2, 6.0, tiny_models.HIDDEN
    source = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    model = tiny_models.build("gpt2").double()
    places = sorted(("query", "key", "value").index(part) for part in parts)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"):
        a = torch.randn(rank * len(parts), width, generator=source)
        b = torch.randn(width * len(parts), rank, generator=source)
        tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        grouped = torch.nn.functional.conv1d(a[None].double(), b[..., None].double(), groups=len(parts))[0]
        delta = torch.zeros(3, width, width).double()
        delta[places] = grouped.view(len(parts), width, width)
        deltas[name] = (alpha / rank) * delta.view(3 * width, width)
    save_file(tensors, tmp_path / "mine.safetensors")
    foreign = read_foreign(tmp_path / "mine.safetensors", alpha=alpha, merged=parts)
    translation, attachment = put_on(
        foreign, tiny_models.build("gpt2").double(), SimpleNamespace(head="causal")
    )
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta.T  # Conv1D holds (in, out)
        expected = model(**tiny_models.inputs("gpt2")).logits
        found = attachment.model.eval()(**tiny_models.inputs("gpt2")).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert translation.settings["rank"] == rank * len(parts)


def test_the_real_file(shared_data: Path) -> None:
    """Microsoft's own RoBERTa base on MNLI, on attention and head of that shape; what it does not touch is small here."""
    path = shared_data / "weights" / REAL
    if not path.is_file():
        pytest.skip(f"needs {path.name}, which is not part of the repository")
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 60}
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    foreign = read_foreign(path, alpha=ALPHA, torch_file=True)
    translation, attachment = put_on(
        foreign, roberta(**sizes).double(), SimpleNamespace(head="classification")
    )
    assert (translation.settings["rank"], translation.settings["targets"]) == (8, "attention_qv")
    assert sum(p.numel() for p in attachment.parameters().values()) == sum(
        t.numel() for t in tensors.values()
    )
    expected = logits(by_hand(roberta(**sizes).double(), tensors, ALPHA))
    torch.testing.assert_close(logits(attachment.model.eval()), expected, rtol=0, atol=1e-10)


def wrong(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = theirs(roberta()) | {k.replace("__", "."): v for k, v in changes.items() if v is not None}
    gone = {name.replace("__", ".") for name, tensor in changes.items() if tensor is None}
    return {name: tensor for name, tensor in tensors.items() if name not in gone}


NOBODY = {"nobody__lora_A": torch.zeros(3, 16), "nobody__lora_B": torch.zeros(16, 3)}
QUERY = "roberta__encoder__layer__0__attention__self__query"


@pytest.mark.parametrize(
    ("changes", "asked", "error", "match"),
    [
        ({}, {"alpha": None}, InputError, r"do not hold alpha: give --alpha.*r 8 and alpha 16"),
        ({}, {"alpha": -1.0}, ConfigError, r"alpha is -1"),
        ({}, {"merged": ["query", "output"]}, ConfigError, r"each is one of query, key, value"),
        ({}, {"ignored": ["r"]}, InputError, r"ignored is for peft folders"),
        ({f"{QUERY}__lora_B": None}, {}, CheckpointError, r"A without B.*layer\.0\.attention\.self\.query"),
        ({f"{QUERY}__lora_A": torch.zeros(4, 16)}, {}, CheckpointError, r"are no pair"),
        ({f"{QUERY}__lora_B": torch.zeros(15, 3)}, {}, CheckpointError, r"do not fit a layer of 16 outputs"),
        (NOBODY, {}, CheckpointError, r"'nobody' is no linear layer"),
        ({f"{QUERY}__bias": torch.zeros(16)}, {}, ConfigError, r"tensors of the base, trained in place.*query\.bias"),
        ({"classifier__dense__bias": None}, {}, CheckpointError, r"missing .*classifier\.dense\.bias"),
        ({"classifier__dense__bias": torch.zeros(7)}, {}, CheckpointError, r"of another shape .*classifier\.dense\.bias"),
        ({"classifier__more": torch.zeros(7)}, {}, CheckpointError, r"unexpected .*classifier\.more"),
        ({"classifier__dense__bias": torch.full((16,), float("inf"))}, {}, CheckpointError, r"not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], asked: dict[str, Any], error: type[PeftlabError], match: str, tmp_path: Path
) -> None:
    base = saved(roberta(), tmp_path / "base")
    torch.save(wrong(**changes), tmp_path / "mine.pt")
    values: dict[str, Any] = {"alpha": 2.0, "torch_file": True} | asked
    with pytest.raises(error, match=match):
        import_adapter(tmp_path / "mine.pt", base=str(base), output=tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_the_parts_of_a_merged_layer_must_be_said(tmp_path: Path) -> None:
    base = tiny_models.save_model(tmp_path / "base", "gpt2")
    name = "transformer.h.0.attn.c_attn"
    save_file(
        {f"{name}.lora_A": torch.ones(4, 16), f"{name}.lora_B": torch.ones(32, 2)},
        tmp_path / "mine.safetensors",
    )
    for merged in ((), ("query",)):
        with pytest.raises(InputError, match=r"adapts 2 of query, key and value.*give --merged"):
            import_adapter(
                tmp_path / "mine.safetensors", base=str(base), output=tmp_path / "out", alpha=4, merged=merged
            )


def test_a_base_of_another_kind(tmp_path: Path) -> None:
    """The message says which names were looked for, and what there is instead."""
    torch.save(theirs(roberta()), tmp_path / "mine.pt")
    asked: dict[str, Any] = {"output": tmp_path / "out", "alpha": 2.0, "torch_file": True}
    bert, llama = (tiny_models.save_model(tmp_path / name, name) for name in ("bert", "llama"))
    with pytest.raises(
        CheckpointError,
        match=r"does not fit the base '.*bert'.*looked for classifier\.weight, classifier\.bias, and beside its adapter the"
        r" file has classifier\.dense\.weight",
    ):
        import_adapter(tmp_path / "mine.pt", base=str(bert), **asked)
    with pytest.raises(
        CheckpointError,
        match=r"'roberta\.encoder.*query' is no linear layer of this llama model; 4 of its 4 adapted layers.*the model has"
        r" .*self_attn\.",
    ):
        import_adapter(tmp_path / "mine.pt", base=str(llama), **asked)
    assert not (tmp_path / "out").exists()
