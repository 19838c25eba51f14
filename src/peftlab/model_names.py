"""What a model's name stands for: a folder, a name on the hub, or a short name for one of those.

Nothing here reads a model or imports torch. A folder wins over a short name, as it does in transformers; the names
under which the hub knew a model before it had an owner ("gpt2") are looked for in the cache too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from peftlab.errors import ModelError, did_you_mean

SHORT_NAMES: dict[str, str] = {
    "peftlab/tiny-base": str(Path(__file__).parent / "assets" / "tiny_base"),
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "gpt-neo-125M": "EleutherAI/gpt-neo-125m",
    "gpt-neo-1.3B": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-2.7B": "EleutherAI/gpt-neo-2.7B",
    "gpt-j-6B": "EleutherAI/gpt-j-6b",
    "codegen-350M": "Salesforce/codegen-350M-mono",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "deberta-base": "microsoft/deberta-base",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "codebert": "microsoft/codebert-base",
    "scibert": "allenai/scibert_scivocab_uncased",
    "biobert": "dmis-lab/biobert-v1.1",
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "t5-large": "google-t5/t5-large",
    "flan-t5-small": "google/flan-t5-small",
    "flan-t5-base": "google/flan-t5-base",
    "flan-t5-large": "google/flan-t5-large",
    "codet5-small": "Salesforce/codet5-small",
    "codet5-base": "Salesforce/codet5-base",
    "ul2": "google/ul2",
    "flan-ul2": "google/flan-ul2",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "alpaca": "chavinlo/alpaca-native",
    "vicuna": "lmsys/vicuna-7b-v1.5",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "gemma-2b": "google/gemma-2b",
    "bart-base": "facebook/bart-base",
    "bart-large": "facebook/bart-large",
    "mbart": "facebook/mbart-large-50",
    "bartpho": "vinai/bartpho-syllable",
    "vit": "google/vit-base-patch16-224",
    "dinov2": "facebook/dinov2-base",
    "siglip": "google/siglip-base-patch16-224",
    "clip": "openai/clip-vit-base-patch32",
}
"""The documents' short names to names on the hub, and the name of the embedded base to its folder."""

DOMAINS: dict[str, str] = {
    "microsoft/codebert-base": "code",
    "allenai/scibert_scivocab_uncased": "science",
    "dmis-lab/biobert-v1.1": "biomedicine",
}
"""Hub name to the field that a model was pretrained for. No config says this, so only what stands here has a domain."""


_PATIENCE = 10.0
"""Seconds that the hub has for its first answer."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A name and what it stands for.

    Attributes:
        given: The name as it was given.
        location: What transformers loads: a folder, or a name on the hub.
        is_folder: Whether it is a folder.
        domain: The field that the model was pretrained for, where that is known.
    """

    given: str
    location: str
    is_folder: bool
    domain: str | None = None


def resolve_name(name: str, *, short_names: Mapping[str, str] = SHORT_NAMES) -> ModelName:
    """What a name stands for.

    Args:
        name: A folder, a name on the hub, or a short name, whatever its case.
        short_names: Short name to what it stands for.

    Returns:
        The name resolved; whether there is such a model is not asked here.

    Raises:
        ModelError: It is empty, or a path, and there is no such folder or no model in it.

    Example:
        >>> resolve_name("gpt-j-6B").location
        'EleutherAI/gpt-j-6b'
    """
    if not name.strip():
        raise ModelError("the model's name is empty: give a folder, a name on the hub or a short name")
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        _check_folder(name, folder)
        return ModelName(name, str(folder), is_folder=True)
    known = {short.lower(): target for short, target in short_names.items()}
    target = known.get(name.lower())
    if target is None:
        return ModelName(name, name, is_folder=False, domain=DOMAINS.get(name))
    if Path(target).expanduser().exists():  # a folder that was registered under a short name
        return ModelName(name, str(Path(target).expanduser()), is_folder=True)
    former = not _is_cached(target) and _is_cached(name)
    return ModelName(name, name if former else target, is_folder=False, domain=DOMAINS.get(target))


def is_out_of_reach(name: ModelName) -> bool:
    """Whether a model would have to come from the hub, and the hub does not answer.

    Asked once, where transformers asks six times with pauses between, half a minute in all. Any answer counts as one:
    what it says is left to transformers.

    Args:
        name: From `resolve_name`.

    Returns:
        True where nothing can be loaded.
    """
    if name.is_folder or _is_offline() or _is_cached(name.location):
        return False
    from huggingface_hub import constants, get_session

    session = get_session()
    library = import_module(
        type(session).__module__.partition(".")[0]
    )  # httpx, or httpx2 from huggingface_hub 2.4 on
    try:
        session.head(constants.ENDPOINT, timeout=_PATIENCE)
    except library.TransportError:
        return True
    return False


def explain_missing(name: ModelName, *, short_names: Mapping[str, str] = SHORT_NAMES) -> str | None:
    """Why a model cannot be found, and what to do.

    Args:
        name: From `resolve_name`.
        short_names: For the suggestion.

    Returns:
        A sentence that says where it was looked for; None where its config is there, so that something else is wrong.
    """
    if name.is_folder or _is_cached(name.location):
        return None
    from huggingface_hub import constants

    resolved = "" if name.given == name.location else f" ({name.location} on the hub)"
    hint = "" if resolved else did_you_mean(name.given, short_names)
    hub = "the hub does not answer or does not have it"
    if _is_offline():
        hub = "the hub was not asked, because HF_HUB_OFFLINE is set"
    return (
        f"no model '{name.given}'{resolved}{hint}: there is no folder {Path(name.given).absolute()}, it is not in the"
        f" Hugging Face cache {constants.HF_HUB_CACHE}, and {hub}. Give a folder that holds config.json, or fetch it where"
        f" there is a network: hf download {name.location}"
    )


def _is_offline() -> bool:
    """Whether the hub must not be asked."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or bool(os.environ.get("TRANSFORMERS_OFFLINE"))


def _is_cached(hub_name: str) -> bool:
    """Whether the config of a hub name lies in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(hub_name, "config.json"), str)
    except HFValidationError:  # no name that the hub could have
        return False


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that is not there or holds no model."""
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {name}; give a folder that holds config.json, or a hub name"
        )
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise ModelError(f"the folder {name} holds no config.json, so it is not a model (it holds {held})")
