"""The map of architectures, held to the table that this version ships: a sample is proved anew, the claims are counted."""

import json

import pytest
import transformers

from peftlab import coverage
from peftlab.commands.families import MEASURED, markdown, render
from peftlab.coverage import Coverage, default_config, text_types, totals, try_type, vision_types
from peftlab.family import FamilyMap
from peftlab.mapping.certifying import prove_config

TABLE = json.loads(MEASURED.read_text(encoding="utf-8"))
ROWS = {row["model_type"]: row for kind in ("text", "vision") for row in TABLE[kind]}
SAMPLE = (
    "albert", "bart", "bert", "bloom", "clip", "codegen", "deberta-v2", "deepseek_v3", "distilbert", "falcon", "fsmt",
    "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_oss", "gptj", "led", "jamba", "llama", "mamba", "mbart", "mistral",
    "mixtral", "modernbert", "mpnet", "olmo2", "qwen2", "qwen3", "roberta", "siglip", "swin", "t5", "vit",
)  # fmt: skip
LEAST = {
    "a tiny twin runs": 229,
    "block outputs are hidden states": 219,
    "token mixer proved in every block": 213,
    "of these, q k v o attributed": 181,
    "target groups resolved and proved": 200,
    "attention maps by the probe, equal to the model's own": 170,
    "attention maps at all": 207,
}
same_library = pytest.mark.skipif(
    transformers.__version__ != TABLE["versions"]["transformers"],
    reason="the table was measured on another release of transformers",
)


@same_library
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_gives_what_the_table_says(model_type):
    types = vision_types() if model_type in coverage.VISION_TYPES else text_types()
    found = try_type(model_type, types[model_type]).to_json()
    expected = ROWS[model_type]
    assert {k: v for k, v in found.items() if k != "seconds"} == {
        k: v for k, v in expected.items() if k != "seconds"
    }


def test_the_claims_are_met():
    for what, least in LEAST.items():
        assert TABLE["totals"]["text"][what] >= least, what
    assert all(row["outputs"] and row["mixers"] and row["attributed"] for row in TABLE["vision"])
    assert {row["model_type"] for row in TABLE["vision"]} == set(coverage.VISION_TYPES)


def test_the_totals_are_those_of_the_rows():
    for kind in ("text", "vision"):
        assert dict(totals(Coverage(**row) for row in TABLE[kind])) == TABLE["totals"][kind]


@same_library
def test_every_type_of_the_library_is_in_the_table():
    assert set(text_types()) == {row["model_type"] for row in TABLE["text"]}


def test_the_page_in_the_docs_is_this_table():
    page = MEASURED.parents[3] / "docs" / "families.md"
    if page.exists():  # not beside an installed package
        assert page.read_text(encoding="utf-8") == markdown(TABLE)
    assert "target groups resolved and proved" in render(TABLE)


NAMES = {
    "q_proj": "query",
    "query": "query",
    "k_proj": "key",
    "key": "key",
    "v_proj": "value",
    "value": "value",
}


@pytest.mark.parametrize(
    "model_type", ["bart", "bert", "fsmt", "llama", "opt", "pegasus_x", "roberta", "t5gemma", "vit"]
)
def test_no_experiment_contradicts_a_telling_name(model_type):
    """Names are not looked at, so they are a witness: where one tells, the role is this, or nothing is claimed."""
    types = text_types() | vision_types()
    twin, certificate, _ = prove_config(types[model_type], default_config(model_type, types[model_type]))
    assert twin is not None, certificate.problem
    roles = [r for stack in certificate.stacks for kind in stack.kinds for r in kind.roles.items()]
    for path, role in roles:
        expected = NAMES.get(path.rpartition(".")[2])
        inside = any(word in path for word in ("attn", "attention"))
        if expected and inside:
            assert role.rpartition(".")[2] in (expected, "linear"), (path, role)
            assert not role.startswith("mlp."), (path, role)


def test_a_type_that_cannot_be_built_says_why(monkeypatch):
    def broken(*_args):
        raise KeyError("no such layer type")

    monkeypatch.setattr(coverage, "default_config", broken)
    row = try_type("llama", text_types()["llama"])
    assert not row.runs
    assert "no such layer type" in row.note


def test_targets_need_a_mixer_and_an_mlp():
    assert not Coverage("x", "X", runs=True, mixers=True, attention=4).targets
    assert Coverage("x", "X", runs=True, mixers=True, attention=4, experts=2).targets
    assert isinstance(FamilyMap("x", (), {}).certificates, tuple)
