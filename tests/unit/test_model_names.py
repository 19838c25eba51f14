"""Names of models: short names, hub names and folders, and what is said where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from peftlab.config import ModelSettings
from peftlab.errors import ModelError
from peftlab.loading import read_config
from peftlab.model_names import DOMAINS, SHORT_NAMES, explain_missing, is_out_of_reach, resolve_name

DOCUMENTED = """gpt2 gpt2-medium gpt2-large gpt-neo-125M gpt-neo-1.3B gpt-j-6B codegen-350M bert-base-uncased roberta-base
distilbert-base-uncased deberta-base t5-base t5-large flan-t5-base ul2 llama-7b llama-13b llama-30b alpaca vicuna tinyllama
mistral-7b codebert scibert biobert bart-base mbart bartpho"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(hub: Path, name: str) -> None:
    """A config in the cache under a hub name."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")


@pytest.mark.parametrize("name", DOCUMENTED.split())
def test_the_documents_names_stand_for_hub_names(name: str, hub: Path) -> None:
    found = resolve_name(name)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", found.location)
    assert (found.given, found.is_folder) == (name, False)
    assert resolve_name(name.upper()) == type(found)(name.upper(), found.location, False, found.domain)


def test_hub_names_stand_for_themselves(hub: Path) -> None:
    assert resolve_name("someone/some-model").location == "someone/some-model"
    assert set(DOMAINS) <= set(SHORT_NAMES.values())
    assert resolve_name("codebert").domain == resolve_name("microsoft/codebert-base").domain == "code"
    assert resolve_name("roberta-base").domain is None


def test_a_folder_wins_over_a_short_name(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(ModelError, match=r"the folder gpt2 holds no config\.json.*holds nothing"):
        resolve_name("gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert resolve_name("gpt2").is_folder
    with pytest.raises(ModelError, match=r"no model folder \./gone"):
        resolve_name("./gone")
    with pytest.raises(ModelError, match="name is empty"):
        resolve_name(" ")


def test_a_cache_under_the_former_name_is_found(hub: Path) -> None:
    assert resolve_name("gpt2").location == "openai-community/gpt2"
    put(hub, "gpt2")
    assert resolve_name("gpt2").location == "gpt2"
    put(hub, "openai-community/gpt2")
    assert resolve_name("gpt2").location == "openai-community/gpt2"


def test_a_missing_model_says_where_it_was_looked_for(hub: Path, tmp_path: Path) -> None:
    said = explain_missing(resolve_name("gpt3"))
    assert said is not None
    for part in (
        "no model 'gpt3' (did you mean 'gpt2'?)",
        str(tmp_path / "gpt3"),
        str(hub),
        "HF_HUB_OFFLINE",
    ):
        assert part in said, part
    said = explain_missing(resolve_name("flan-t5-base"))
    assert said is not None
    assert "(google/flan-t5-base on the hub)" in said
    assert "hf download google/flan-t5-base" in said
    put(hub, "google/flan-t5-base")
    assert explain_missing(resolve_name("flan-t5-base")) is None
    assert explain_missing(resolve_name("no hub name at all!")) is not None


def test_a_hub_that_does_not_answer_is_asked_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    name = resolve_name("flan-t5-base")
    assert not is_out_of_reach(name), "offline, the hub must not be asked"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers 501 to everything
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert not is_out_of_reach(name)
        server.shutdown()
        thread.join()
    assert is_out_of_reach(name)
    with pytest.raises(ModelError, match="the hub does not answer or does not have it"):
        read_config(ModelSettings(name="flan-t5-base"))
    put(hub, "google/flan-t5-base")
    assert not is_out_of_reach(name)


def test_the_table_is_light() -> None:
    code = "import sys, peftlab.model_names as m; m.resolve_name('gpt2'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
