"""What is trained whole beside a half-precision base: float32 tensors, answers in the base's dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_cases import ALLOWED, make_config, measure
from safetensors.torch import load_file
from torch import nn

import peftlab
import tiny_models
from peftlab.attaching.wide_copies import narrow, widen
from peftlab.catalog import METHODS
from peftlab.insertion.new_blocks import GATE
from peftlab.mapping import map_model
from peftlab.memory.prediction import predict_memory
from peftlab.memory.steps import BatchShape
from tiny_runs import run, same

HALF = (torch.bfloat16, torch.float16)
WHOLE = [
    ("lora", "bert", {}),
    ("lora", "distilbert", {}),
    ("new_layer", "bert", {}),
    ("new_layer", "distilbert", {}),
    ("hybrid", "bert", {}),
    ("adalora", "bert", {}),
    ("ia3", "bert", {}),
    ("prompt_tuning", "bert", {}),
    ("p_tuning", "distilbert", {}),
    ("prefix_tuning", "bert", {}),
    ("peft", "bert", {"type": "vera", "config": {"projection_prng_key": 1}}),
    ("peft", "llama_tied", {"type": "lokr", "targets": "all"}),
    ("lora", "llama", {"targets": "all"}),
    ("lora", "llama_tied", {"targets": "all"}),
    ("lora", "gpt2", {"targets": "all"}),
    ("lora", "t5", {"targets": "all"}),
    ("lora", "bart", {"targets": "all"}),
    ("hybrid", "gpt2", {"targets": "all"}),
    ("adalora", "t5", {"targets": "all"}),
    ("lora", "llama", {"modules_to_save": ("model.norm",)}),
]
"""Each way in which modules come to be trained whole: method, model, settings."""


def attach(method: str, name: str, dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    base, leaf = tiny_models.build(name).to(dtype), METHODS.load(method)
    attached = leaf.attach(
        base, map_model(base), leaf.Settings(**settings), head=tiny_models.HEADS[name], seed=1
    )
    return base, attached


def logits(model: nn.Module, name: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_models.inputs(name)).logits
    return found


def train(attached: Any, name: str, *, steps: int = 3, rate: float = 2e-4) -> None:
    attached.model.train()
    optimizer = torch.optim.AdamW(attached.parameters().values(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        attached.model(**tiny_models.training_inputs(name, seed=step)).loss.backward()
        optimizer.step()


def trained_whole(attached: Any) -> dict[str, nn.Parameter]:
    """The copies of the base's own tensors: peft's, or a new layer's heads."""
    heads = tuple(f"{name}." for name in getattr(attached, "_trained_heads", ()))
    found = {
        name: p
        for name, p in attached.parameters().items()
        if ".modules_to_save." in name or (heads and name.startswith(heads))
    }
    assert found
    return found


@pytest.mark.parametrize(("method", "name", "settings"), WHOLE)
def test_copies_train_in_float32_and_answer_in_the_base_s_dtype(
    method: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    bare = tiny_models.build(name).bfloat16()
    base, attached = attach(method, name, torch.bfloat16, **settings)
    originals = {n: t.clone() for n, t in bare.state_dict().items()}
    whole = trained_whole(attached)
    assert {p.dtype for p in attached.parameters().values()} == {torch.float32}
    started = {n: p.detach().clone() for n, p in whole.items()}
    train(attached, name)
    for n, p in whole.items():
        assert p.grad is not None, n
        reached = p.grad != 0  # most rows of an embedding are in no batch
        assert bool(reached.any()), n
        assert bool((p != started[n])[reached].all()), n
    answers = logits(attached.model, name)
    assert answers.dtype == torch.bfloat16
    with attached.disabled():
        assert torch.equal(logits(attached.model, name), logits(bare, name))
    assert torch.equal(logits(attached.model, name), answers)

    kept = attached.tensors()
    attached.save(tmp_path / "saved")
    files = [load_file(path) for path in (tmp_path / "saved").rglob("*.safetensors")]
    assert {t.dtype for file in files for t in file.values()} == {torch.float32}
    for again in ("load", "load_saved"):
        _, other = attach(method, name, torch.bfloat16, **settings)
        other.load(kept) if again == "load" else other.load_saved(tmp_path / "saved")
        assert all(torch.equal(p, trained_whole(other)[n]) for n, p in whole.items()), again
        assert torch.equal(logits(other.model, name), answers), again

    attached.remove()
    assert {n: t.dtype for n, t in base.state_dict().items()} == {n: t.dtype for n, t in originals.items()}
    assert all(torch.equal(t, originals[n]) for n, t in base.state_dict().items())
    assert torch.equal(logits(base, name), logits(bare, name))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "t5", "bart"])
def test_an_untrained_copy_answers_bit_for_bit_as_the_base(name: str, dtype: torch.dtype) -> None:
    _, attached = attach("lora", name, dtype, targets="all")
    found = logits(attached.model, name)
    assert found.dtype == dtype
    assert torch.equal(found, logits(tiny_models.build(name).to(dtype), name))
    copies = list(trained_whole(attached).values())
    assert len(copies) == (2 if name == "llama" else 1)  # what is tied is one parameter


@pytest.mark.parametrize(("name", "modules"), [("llama_tied", 2), ("gpt2", 2), ("t5", 4)])
def test_tied_copies_stay_tied(name: str, modules: int) -> None:
    _, attached = attach("lora", name, torch.bfloat16, targets="all")
    train(attached, name)
    own = [
        m for m in attached.model.modules() if hasattr(m, "modules_to_save") and hasattr(m, "original_module")
    ]
    held = [m.modules_to_save["default"]._parameters["weight"] for m in own]
    assert len(held) == modules
    assert len({id(p) for p in held}) == 1
    assert held[0].dtype == torch.float32
    assert all(m.modules_to_save["default"].weight.dtype == torch.bfloat16 for m in own)


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [("lora", "bert", {}), ("lora", "llama", {"targets": "all"}), ("new_layer", "bert", {}),
     ("hybrid", "bert", {}), ("ia3", "distilbert", {})],
)  # fmt: skip
def test_merging_rounds_a_copy_once_and_leaves_plain_modules(
    method: str, name: str, settings: dict[str, Any]
) -> None:
    base, attached = attach(method, name, torch.bfloat16, **settings)
    kinds = {
        path.replace("base_model.model.", ""): type(m) for path, m in tiny_models.build(name).named_modules()
    }
    train(attached, name, rate=0.02)
    for n, p in attached.parameters().items():
        if n.endswith(GATE):  # a plain block has none
            p.data.fill_(1.0)
    expected = logits(attached.model, name)
    rounded = sorted(
        (n.split(".modules_to_save.")[0].rpartition(".")[2], p.detach().bfloat16())
        for n, p in trained_whole(attached).items()
        if n.endswith("weight")
    ) if method != "new_layer" else []  # fmt: skip
    merged = attached.merge()
    assert merged is base
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert all(type(m) is kinds[path] for path, m in base.named_modules() if path in kinds)
    for last, weight in rounded:
        found = [m for path, m in base.named_modules() if path.rpartition(".")[2] == last]
        assert any(torch.equal(m.weight, weight) for m in found)
    answers = logits(base, name)
    assert answers.dtype == torch.bfloat16
    torch.testing.assert_close(answers, expected, rtol=0.1, atol=0.1)


def test_a_copy_alone_merges_bit_for_bit() -> None:
    """Beside a LoRA that adds nothing, the merged model computes with what the copy computed with."""
    base, attached = attach("lora", "bert", torch.bfloat16, dropout=0.0)
    for p in trained_whole(attached).values():
        with torch.no_grad():
            p.add_(torch.linspace(-1e-3, 1e-2, p.numel()).view_as(p))
    assert attached.model is not base
    expected = logits(attached.model, "bert")
    assert torch.equal(logits(attached.merge(), "bert"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_wider_bases_are_left_alone(dtype: torch.dtype) -> None:
    _, attached = attach("lora", "llama", dtype, targets="all")
    head = attached.model.base_model.model.lm_head.modules_to_save["default"]
    assert type(head) is nn.Linear
    assert head.weight.dtype == dtype
    assert head.weight is head._parameters["weight"]


def test_gradients_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    narrow_one = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).bfloat16()
    wide, x = copy.deepcopy(narrow_one), torch.randn(5, 8).bfloat16()
    widen(wide)
    narrow_one(x).float().square().sum().backward()
    wide(x).float().square().sum().backward()
    for (n, p), (m, q) in zip(narrow_one.named_parameters(), wide.named_parameters(), strict=True):
        assert (n, q.dtype, q.is_leaf) == (m, torch.float32, True)
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad.float(), q.grad)
    assert list(wide.state_dict()) == list(narrow_one.state_dict())
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}


def test_a_widened_module_is_still_one_of_its_class() -> None:
    module = nn.Embedding(6, 4).half()
    parameter = module.weight
    widen(module)
    widen(module)
    assert isinstance(module, nn.Embedding)
    assert type(module).__name__ == "Embedding"
    assert module._parameters["weight"] is parameter
    twin = copy.deepcopy(module)
    narrow(module)
    assert (type(module), module.weight.dtype) == (nn.Embedding, torch.float16)
    assert twin(torch.tensor([1])).dtype == torch.float16
    assert next(twin.parameters()).dtype == torch.float32
    assert twin.to("meta")(torch.zeros(1, dtype=torch.long, device="meta")).dtype == torch.float16


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_memory_is_predicted_in_the_dtypes_that_are(name: str, tmp_path: Path) -> None:
    config = make_config(
        tmp_path, name, model={"dtype": "bfloat16"}, method={"name": "lora", "targets": "all"}
    )
    shape = BatchShape(2, 64, 64)
    predicted, measured = predict_memory(config, shape=shape), measure(config, shape)
    assert predicted.parts["weights"] == measured.weights_bytes
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=ALLOWED)


@pytest.mark.parametrize(("name", "targets"), [("bert", "both"), ("llama_tied", "all")])
def test_a_run_that_goes_on_equals_one_that_was_not_cut(
    name: str, targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny_models.build
    monkeypatch.setattr(tiny_models, "build", lambda *given: built(*given).bfloat16())
    given: dict[str, Any] = {
        "phases": (), "targets": targets, "dtype": None, "probe": False, "max_steps": 4, "learning_rate": 2e-4,
        "save_steps": 2, "validation_steps": 2,
    }  # fmt: skip
    whole = run(tmp_path / "whole", name, **given)
    assert {p.dtype for p in whole.attachment.parameters().values()} == {torch.float32}
    resumed = run(tmp_path / "resumed", name, resume=tmp_path / "whole" / "checkpoint-2", **given)
    assert same(resumed.tensors, whole.tensors)


def test_a_whole_run_of_a_classifier_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_models.save_model(tmp_path / "model", "bert")
    words = ("red", "green", "blue", "small", "big", "cat", "dog", "bird", "house", "tree", "mat", "food")
    rows = [{"text": f"{word} name", "label": "yes" if i % 2 else "no"} for i, word in enumerate(words)]
    made = peftlab.finetune(
        str(model), rows, max_steps=6, batch_size=4, learning_rate=2e-4, output_dir=tmp_path / "runs",
        settings={"model": {"dtype": "bfloat16"}, "training": {"warmup_steps": 0, "validation_steps": 6}},
    )  # fmt: skip
    assert [phase["proved"] for phase in made.folder.summary()["phases"]] == [True]
    saved = load_file(made.path / "final_model" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    head = next(tensor for name, tensor in saved.items() if name.endswith("classifier.weight"))
    assert not torch.equal(head, head.bfloat16().float())
    reopened, _ = peftlab.load(made.path)
    assert {p.dtype for n, p in reopened.named_parameters() if "modules_to_save" in n} == {torch.float32}


def test_a_hybrid_on_an_existing_layer_takes_its_trained_head_over() -> None:
    from peftlab.attaching.combining import HybridAttachment

    base, existing = attach("new_layer", "bert", torch.bfloat16)
    train(existing, "bert")
    leaf = METHODS.load("hybrid")
    made = HybridAttachment(
        base, existing.family, leaf.Settings(), head="classification", seed=1, existing=existing
    )
    assert {p.dtype for p in made.parameters().values()} == {torch.float32}
    train(made, "bert", rate=0.02)
    for n, p in made.parameters().items():
        if n.endswith(GATE):
            p.data.fill_(1.0)
    expected = logits(made.model, "bert")
    made.merge()
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert type(base.classifier) is nn.Linear
    torch.testing.assert_close(logits(base, "bert"), expected, rtol=0.1, atol=0.1)


def test_plain_peft_answers_the_same_from_the_saved_file(tmp_path: Path) -> None:
    """peft loads the file into copies in the base's dtype: the rounding that is computed with here."""
    import peft

    _, attached = attach("lora", "bert", torch.bfloat16)
    train(attached, "bert", rate=0.02)
    attached.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_models.build("bert").bfloat16(), str(tmp_path))
    # A and B are multiplied in the base's dtype, peft multiplies them in float32: bfloat16 has 8 bits
    torch.testing.assert_close(logits(theirs, "bert"), logits(attached.model, "bert"), rtol=0.02, atol=0.02)
