"""Methods that train virtual tokens or prefixes and leave every layer as it is: prompt tuning, P-tuning, prefix tuning.

peft saves what the encoder of the prompt puts out, not the encoder: enough to answer, not to go on training. Checkpoints
hold the encoder itself, and a bundle has it in a file of its own beside peft's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from peftlab.attaching.attachment import ADAPTER, TASK_TYPES, PeftAttachment
from peftlab.attaching.merging import check_not_over
from peftlab.attaching.pooling import IdsBesideEmbeddings, looks_for_pads
from peftlab.attaching.tensors import read_tensors
from peftlab.errors import CheckpointError, MethodError
from peftlab.family import Selection

_PREPARES = "prepare_inputs_for_generation"
_CACHES = (peft.PeftType.PREFIX_TUNING, peft.PeftType.CARTRIDGE)
"""What trains keys and values, which stand at the beginning of a cache."""
ENCODER_FILE = "prompt_encoder.safetensors"
"""What peft leaves out of its file: the encoder's own weights."""


class PromptAttachment(PeftAttachment):
    """Virtual tokens or prefixes on a base; satisfies `method.Attachment`.

    Args:
        model: The base.
        config: The peft config.
        seed: Seeds the prompt.

    Raises:
        MethodError: The base cannot be given virtual tokens or prefixes.
    """

    def __init__(self, model: nn.Module, config: Any, *, seed: int) -> None:
        name = str(config.peft_type.value).lower()
        if not hasattr(model, "get_input_embeddings") or getattr(model, "main_input_name", "") != "input_ids":
            raise MethodError(
                f"{name} puts virtual tokens beside a text, and {type(model).__name__} reads none"
            )
        _check_room(model, config, name)
        _check_reads(model, config, name)
        is_cache = config.peft_type in _CACHES
        if not is_cache:
            _give_sizes(model, config)
        by_ids = not is_cache and config.task_type == TASK_TYPES["classification"] and looks_for_pads(model)
        try:
            super().__init__(model, config, Selection(()), steps_to_train=lambda _: 1, seed=seed)
        except (ValueError, AttributeError, TypeError) as error:
            raise MethodError(f"{name} does not work on {type(model).__name__}: {error}") from error

        self._ids = (
            IdsBesideEmbeddings(self.model, model, num_virtual_tokens=config.num_virtual_tokens)
            if by_ids
            else None
        )
        if self.config.peft_type == peft.PeftType.PREFIX_TUNING and self.config.task_type == "SEQ_2_SEQ_LM":
            self.model.get_prompt = self._decoder_prefixes
        if is_cache and hasattr(model, "generate"):
            self.model.generate = self._generate

    def _check_targets(self) -> None:
        """Nothing is targeted."""

    def _decoder_prefixes(self, batch_size: int, *_: Any, **__: Any) -> EncoderDecoderCache:
        """The keys and values of each decoder layer's attention to itself.

        peft 0.21 hands out the same values twice and deals them wrongly: half of the layers share a prefix, and the others'
        is never read.
        """
        config, encoder = self.config, self.model.prompt_encoder[ADAPTER]
        device = next(encoder.parameters()).device
        tokens = torch.arange(config.num_virtual_tokens, device=device).expand(batch_size, -1)
        heads = config.num_attention_heads
        flat = encoder(tokens).to(self.model.base_model.dtype)
        parts = flat.view(batch_size, config.num_virtual_tokens, config.num_layers, 2, heads, -1)
        keys_values = parts.permute(2, 3, 0, 4, 1, 5)  # layer, key or value, batch, heads, prefix, head
        return EncoderDecoderCache(DynamicCache([(k, v) for k, v in keys_values]), DynamicCache())

    def _generate(self, *given: Any, **more: Any) -> Any:
        """Generate with a cache, where the prefix stands; without one, peft 0.21 loses it after the first token, or fails.

        Raises:
            MethodError: A cache is not wanted.
        """
        if (
            more.get("use_cache") is False
            or getattr(more.get("generation_config"), "use_cache", None) is False
        ):
            name = str(self.config.peft_type.value).lower()
            raise MethodError(f"{name} stands in the cache of keys and values: generate with use_cache=True")
        return type(self.model).generate(
            self.model, *given, **more, **({} if "use_cache" in more else {"use_cache": True})
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which `model` answers as the base does."""
        base = self.model.base_model
        vars(base).pop(
            _PREPARES, None
        )  # peft 0.21 leaves its own there after generating with an encoder-decoder
        lacking = [m for m in (self.model, base) if not hasattr(m, _PREPARES)]
        for module in lacking:  # peft exchanges what a classifier does not have
            setattr(module, _PREPARES, None)
        own = None
        if hasattr(
            base, "generate"
        ):  # peft would put virtual tokens in front of an encoder's text all the same
            own = vars(self.model).get("generate")
            self.model.generate = base.generate
        heads = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        try:
            with super().disabled():
                for module in heads:  # peft disables new heads with adapters, not with prompts
                    module.enable_adapters(False)
                try:
                    yield
                finally:
                    for module in heads:
                        module.enable_adapters(True)
        finally:
            vars(self.model).pop("generate", None)
            if own is not None:
                self.model.generate = own
            for module in lacking:
                vars(module).pop(_PREPARES, None)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The prompt's tensors, and those of a new head, by their names in `model`."""
        encoder = f"prompt_encoder.{ADAPTER}."
        saved = f".modules_to_save.{ADAPTER}."
        return {n: p for n, p in self.model.named_parameters() if n.startswith(encoder) or saved in n}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on, the prompt's encoder among it, on the CPU."""
        return {
            name.replace(f".{ADAPTER}.", "."): p.detach().to("cpu", copy=True).contiguous()
            for name, p in self.parameters().items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved tensors back.

        Args:
            tensors: As `tensors` gave them.

        Raises:
            CheckpointError: Names or shapes differ from this adapter's.
        """
        self.check_fit(tensors)
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                parameter.copy_(tensors[name.replace(f".{ADAPTER}.", ".")])

    def save(self, folder: Path) -> None:
        """Write what peft writes, and the encoder beside it.

        Args:
            folder: Where; made if needed.
        """
        super().save(folder)
        save_file(self.tensors(), folder / ENCODER_FILE)

    def load_saved(self, folder: Path) -> None:
        """Put back what `save` wrote.

        Args:
            folder: The folder.

        Raises:
            CheckpointError: It does not fit, or holds peft's file alone.
        """
        if not (folder / ENCODER_FILE).is_file():
            raise CheckpointError(
                f"{folder} has no {ENCODER_FILE}: the prompt's encoder is not in peft's own file"
            )
        self.load(read_tensors(folder / ENCODER_FILE))

    def merge(self) -> nn.Module:
        """Refused: a prompt is read beside the text and is in no weight of the base.

        Raises:
            MethodError: Always.
        """
        check_not_over(self.ended, "merged")
        raise MethodError(
            f"{str(self.config.peft_type.value).lower()} trains what the model reads beside a text, which no weight of the"
            " base could hold: it cannot be merged; keep it beside the base (save), or take it off (remove)"
        )

    def remove(self) -> nn.Module:
        """Take the prompt off.

        Returns:
            The base as it was given.
        """
        for name in ("get_prompt", "generate"):
            vars(self.model).pop(name, None)
        vars(self.model.base_model).pop(_PREPARES, None)
        if self._ids is not None:
            self._ids.remove()
        return self._hand_back(self.model.base_model)


def _check_room(model: Any, config: Any, name: str) -> None:
    """Refuse more virtual tokens than the model has positions.

    Raises:
        MethodError: No text would fit behind them.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.num_virtual_tokens >= positions:
        raise MethodError(
            f"{name}: num_virtual_tokens {config.num_virtual_tokens} leaves no room for a text in the {positions} positions"
            f" of this {type(model).__name__}; use fewer, some tens are usual"
        )


def _check_reads(model: Any, config: Any, name: str) -> None:
    """Refuse a base that peft puts virtual tokens or prefixes on, and that then fails in the forward pass.

    Raises:
        MethodError: It is one.
    """
    kind = type(model).__name__
    if config.task_type == TASK_TYPES["classification"] and getattr(
        model.config, "is_encoder_decoder", False
    ):
        raise MethodError(
            f"{name} does not work on {kind}: its decoder reads the ids of the text again, and answers from the last eos"
            " among them, where virtual tokens have no ids; lora and ia3 suit it"
        )
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), model)
    takers = [inspect.signature(part.forward).parameters for part in (model, trunk)]
    if config.peft_type in _CACHES and not any("past_key_values" in taken for taken in takers):
        raise MethodError(
            f"{name} gives keys and values from outside (past_key_values), and {kind} takes none; prompt_tuning and p_tuning"
            " give it embeddings"
        )


def _give_sizes(model: Any, config: Any) -> None:
    """Tell peft what it looks for under names that not every config has (DistilBERT)."""
    if config.token_dim is None:
        config.token_dim = embedding_width(model)
    if config.num_attention_heads is None:  # asked for, and read by no prompt
        config.num_attention_heads = getattr(model.config.get_text_config(), "num_attention_heads", None)


def embedding_width(model: nn.Module) -> int:
    """The width of a base's input embeddings.

    Args:
        model: The base.

    Returns:
        Features of one token; 1 where it reads no tokens, which `PromptAttachment` refuses.
    """
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embed, "weight", None)
    return int(weight.shape[1]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else 1
