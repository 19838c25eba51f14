"""The base in the package: it loads without a network, is small, speaks, and its making can be repeated."""

import hashlib
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftlab.task import render_prompt
from peftlab.tasks import embedded

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "src" / "peftlab" / "assets" / "tiny_base"
SCRIPTS = ROOT / "scripts"
MEBIBYTES_6 = 6 * 1024 * 1024


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tiny_base_corpus

    return tiny_base_corpus


def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_it_is_small():
    assert sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()) <= MEBIBYTES_6


def test_it_holds_no_pickle():
    assert {p.suffix for p in ASSETS.rglob("*") if p.is_file()} <= {".json", ".safetensors"}


def test_it_loads_without_a_network_and_speaks(no_network):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    assert len(tokenizer) == model.config.vocab_size
    prompt = tokenizer(
        render_prompt(embedded.PROMPT, "name[The Copper Kettle], eatType[pub]"), return_tensors="pt"
    )
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert re.search(r"\w", text)


def test_end_and_padding_differ_and_nothing_is_added():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    text = "Prices at The Copper Kettle are £20-25, é."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_name_has_the_same_tokens_wherever_it_stands():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    name = tokenizer.tokenize("Copper Kettle")
    for text in ("name[Copper Kettle]", "at Copper Kettle."):
        pieces = tokenizer.tokenize(text)
        assert any(pieces[i : i + len(name)] == name for i in range(len(pieces)))


def test_the_corpus_leaves_the_task_out(corpus):
    documents = corpus.generate(4000, seed=42)
    text = "\n".join(f"{head} {body}" for head, body in documents)
    assert not corpus.FORBIDDEN.search(text)
    assert not re.search(r"restaurant|coffee|eattype|\bpub\b|\w\[|meaning:", text.lower())
    assert not re.search(r"^text:", text, re.MULTILINE)


def test_the_corpus_knows_no_name_of_the_task(corpus):
    text = "\n".join(f"{head} {body}" for head, body in corpus.generate(4000, seed=42))
    for example in embedded.load(None, seed=0).test:
        for value in example.values[:1]:
            assert value.removeprefix("The ") not in text


@pytest.mark.parametrize(
    "found", ["a pub", "name[x]", "meaning: a", "a\ntext: b", "eatType", "Coffee shop", "a restaurant"]
)
def test_the_guard_finds_what_it_should(corpus, found):
    assert corpus.FORBIDDEN.search(found)


def test_the_script_gives_the_same_bytes_twice(tmp_path):
    command = [sys.executable, str(SCRIPTS / "make_tiny_base.py"), "--quick", "--threads", "1", "--out"]
    folders = [tmp_path / "a", tmp_path / "b"]
    running = [
        subprocess.Popen([*command, str(f)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for f in folders
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert sums(folders[0]) == sums(folders[1])
    assert "model.safetensors" in sums(folders[0])
