"""Base models and tokenizers: the embedded one, a local folder, a short name, or a hub name."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlab.config import ModelSettings
from peftlab.devices import choose_device, choose_dtype
from peftlab.errors import ModelError
from peftlab.method import Head
from peftlab.model_names import ModelName, explain_missing, is_out_of_reach, resolve_name
from peftlab.streams import seed_for


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a base comes from and what it is, before its weights are read.

    Attributes:
        name: The name as given.
        location: What transformers loads: a folder or a hub name.
        config: transformers' config.
        tokenizer: Its tokenizer, with a pad token.
        head: What it ends in.
    """

    name: str
    location: str
    config: Any
    tokenizer: Any
    head: Head


def find_model(
    settings: ModelSettings, *, num_labels: int | None = None, as_texts: bool = False
) -> ModelSource:
    """Read a model's config and tokenizer.

    Args:
        settings: Which model.
        num_labels: Number of classes for a classification task; None for tasks that generate text.
        as_texts: Whether the classes can also be written: then only a model that cannot write is made a classifier.

    Returns:
        The source; cheap, no weights are read.

    Raises:
        ModelError: There is no such model, it has no tokenizer, or it cannot generate text where the task needs that.
    """
    location, config = read_config(settings)
    if as_texts and writing_head(config) is not None:
        num_labels = None
    head = choose_head(settings.name, config, num_labels)
    if num_labels is not None:
        config.num_labels = num_labels
    tokenizer = read_tokenizer(settings, location)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # pads are masked by position, so eos is still learnt
    if head == "classification":  # the model finds a row's last token by this id
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > getattr(config.get_text_config(), "vocab_size", len(tokenizer)):
        raise ModelError(
            f"the tokenizer of '{settings.name}' has {len(tokenizer)} tokens but the model only"
            f" {config.get_text_config().vocab_size}: they do not belong together"
        )
    return ModelSource(settings.name, location, config, tokenizer, head)


def read_config(settings: ModelSettings, *, name: ModelName | None = None) -> tuple[str, Any]:
    """Find a model and read its config.

    Args:
        settings: Which model.
        name: Its name, where that is resolved already.

    Returns:
        What transformers loads (a folder or a hub name), and transformers' config.

    Raises:
        ModelError: There is no such model, or its config cannot be read.
    """
    import transformers

    name = name or resolve_name(settings.name)
    if is_out_of_reach(name):
        raise ModelError(str(explain_missing(name)))
    try:
        return name.location, transformers.AutoConfig.from_pretrained(name.location, **_remote(settings))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            explain_missing(name)
            or f"the model '{settings.name}' has no config that transformers can read: {_first(error)}"
        ) from error


def read_tokenizer(settings: ModelSettings, location: str) -> Any:
    """Read a model's tokenizer.

    Args:
        settings: Which model.
        location: From `read_config`.

    Returns:
        transformers' tokenizer.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **_remote(settings))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the model '{settings.name}' has no tokenizer beside it: {_first(error)}"
        ) from error
    ordinary = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(ordinary) <= 1:  # transformers makes an empty one of its class where there are no files
        raise ModelError(f"the model '{settings.name}' has no tokenizer beside it: its vocabulary is empty")
    return tokenizer


def load_model(source: ModelSource, settings: ModelSettings, *, seed: int = 42) -> nn.Module:
    """Read the weights.

    Args:
        source: From `find_model`.
        settings: dtype, device, gradient checkpointing.
        seed: Seeds a classification head that is new.

    Returns:
        The model in evaluation mode on its device.

    Raises:
        ModelError: The weights are missing, damaged, or not for this architecture.
        ConfigError: The device is not there.
    """
    device = choose_device(settings.device)
    new_head = source.head == "classification"
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "head"))
        model, missing = read_weights(
            _auto_class(source.head),
            source.config,
            settings,
            source.location,
            dtype=choose_dtype(settings.weights_dtype, device),
            ignore_mismatched_sizes=new_head,  # a head for other classes is made anew
        )
    if missing and not new_head:  # a classification head is new and is trained
        raise ModelError(
            f"the weights of '{source.name}' lack {', '.join(missing[:5])}: not a whole model of this kind"
        )
    model.to(device).eval()
    _check_generation(model, source)
    if settings.gradient_checkpointing:
        switch_checkpointing(model, True)
    return model  # type: ignore[no-any-return]


def switch_checkpointing(model: Any, on: bool) -> None:
    """Switch gradient checkpointing on or off.

    Args:
        model: A transformers model.
        on: Whether it shall be on.

    Raises:
        ModelError: The model cannot do it.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{type(model).__name__} has no gradient checkpointing")
    name = (
        "activation_checkpointing"
        if hasattr(model, "activation_checkpointing_enable")
        else "gradient_checkpointing"
    )
    if not on:
        getattr(model, f"{name}_disable")()
    elif name == "activation_checkpointing":  # its name since transformers 5.23
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def read_weights(
    auto: Any, config: Any, settings: ModelSettings, location: str, **options: Any
) -> tuple[Any, list[str]]:
    """Build a model and read its weights into it.

    Args:
        auto: A model class of transformers, or one of its auto classes.
        config: The model's config.
        settings: Which model.
        location: From `read_config`.
        options: More for `from_pretrained`: dtype, device_map ...

    Returns:
        The model and the names of tensors that the files lack, sorted.

    Raises:
        ModelError: The weights are not there, damaged, or not for this class.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"revision": "main"} | _remote(settings) | options
    try:
        model, report = auto.from_pretrained(location, config=config, output_loading_info=True, **options)
    except Exception as error:
        if (
            not isinstance(error, OSError | ValueError | RuntimeError)
            and "safetensor" not in type(error).__name__.lower()
        ):
            raise
        raise ModelError(f"the weights of '{settings.name}' cannot be loaded: {_first(error)}") from error
    return model, sorted(report["missing_keys"])


def meta_model(source: ModelSource, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model's structure without weights, for maps and counts.

    Args:
        source: From `find_model`.
        dtype: Of its tensors; None is that of its files.

    Returns:
        The model on the meta device.
    """
    config = source.config
    if dtype is not None:
        config = copy.deepcopy(config)
        config.dtype = config.get_text_config().dtype = dtype
    with torch.device("meta"):
        model: nn.Module = _auto_class(source.head).from_config(config)
    return model


def hash_tensors(source: ModelSource) -> str:
    """SHA-256 of a base's tensors on disk: names, dtypes, shapes and bytes, whatever files they are split into.

    Args:
        source: From `find_model`.

    Returns:
        The hexadecimal digest; "" where the weights are not local safetensors (a hub name, a .bin file).
    """
    from safetensors import safe_open

    folder = Path(source.location)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    where: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if where else ""


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, merges and special tokens.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The hexadecimal digest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(tokenizer.get_vocab() if backend is None else _lasting(backend), sort_keys=True)
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{content}\n{special}".encode()).hexdigest()


def _lasting(backend: Any) -> dict[str, Any]:
    """What a tokenizer is, without how its last call cut and padded."""
    content: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("truncation", "padding")}


def _remote(settings: ModelSettings) -> dict[str, Any]:
    """What transformers is told about where a model comes from."""
    remote: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision is not None:
        remote["revision"] = settings.revision
    return remote


def choose_head(name: str, config: Any, num_labels: int | None) -> Head:
    """What a model of this config is trained as for a task."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if num_labels is not None:
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise ModelError(
                f"'{name}' ({config.model_type}) has no sequence-classification form in transformers"
            )
        return "classification"
    head = writing_head(config)
    if head is None:
        raise ModelError(
            f"'{name}' ({config.model_type}) is not a causal or sequence-to-sequence language model, so it cannot write"
            " the task's answers; choose a model such as Llama, GPT-2, T5 or BART"
        )
    return head


def writing_head(config: Any) -> Head | None:
    """How a model of this config writes text; None where it cannot."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False) and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "seq2seq"
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return "causal" if kind in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder else None


def _auto_class(head: Head) -> Any:
    """Transformers' auto class for a kind of head."""
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classification": transformers.AutoModelForSequenceClassification,
    }[head]


def _check_generation(model: Any, source: ModelSource) -> None:
    """Find an invalid generation config now, not at the first save hours later."""
    config = getattr(model, "generation_config", None)
    if source.head == "classification" or config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ModelError(f"the generation config of '{source.name}' is invalid: {_first(error)}") from error


def _first(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
