"""One way to work with every model: load it, read its activations, attention and norms, and give back memory.

The adapter does everything through the model's map and knows no architecture.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peftlab.config import ModelSettings
from peftlab.devices import choose_device, choose_dtype
from peftlab.errors import DataError, ModelError
from peftlab.inspection.activations import extract_activations
from peftlab.inspection.attention import AttentionPatterns, get_attention_patterns
from peftlab.inspection.attention_inputs import model_inputs, side_of
from peftlab.inspection.block_outputs import choose_stack, evaluation_mode
from peftlab.inspection.norm_statistics import NormStatistics, norm_statistics
from peftlab.inspection.reading_limits import as_texts, repeatable
from peftlab.inspection.shards import Activations
from peftlab.inspection.words import AlignmentReport, measure_alignment
from peftlab.loading import read_config, read_tokenizer, read_weights, switch_checkpointing
from peftlab.mapping import map_model
from peftlab.mapping.spot_check import spot_check
from peftlab.memory.checkpointing import MemoryOptimization, measure_checkpointing
from peftlab.memory.placement import find_room, place_model
from peftlab.model_config import LayerMapping, ModelConfig, describe_model
from peftlab.model_facts import ModelFamily, empty_model, main_stack, model_class
from peftlab.model_names import resolve_name

if TYPE_CHECKING:
    from peftlab.family import FamilyMap


class UniversalModelAdapter:
    """Works with one model.

    Args:
        config: What the model is, from `UniversalModelRegistry.get_model_config`.

    Attributes:
        config: What the model is.
        tokenizer: Its tokenizer; None for a model that reads no text.
        alignment: How often words and tokens meet with that tokenizer, measured when it was loaded.

    Raises:
        ModelError: The model is of a family that this adapter is not for.
    """

    families: ClassVar[tuple[ModelFamily, ...]] = tuple(ModelFamily)
    """The families that this adapter is for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = self._checked(config)
        self._find_model: Callable[[], Any] = _no_model
        self.tokenizer: Any = None
        self.alignment: AlignmentReport | None = None
        self._family: FamilyMap | None = None

    @property
    def model(self) -> Any:
        """The loaded model, in evaluation mode; None before `load_model`, and after it has left a cache."""
        return self._find_model()

    def load_model(self, name: str | None = None, device: str = "auto", *, dtype: str = "auto") -> nn.Module:
        """Read a model's weights.

        Args:
            name: A short name, a hub name or a folder; None takes the config's. Another model than the config's is looked
                up first, and `config` becomes its own.
            device: auto (CUDA, then MPS, then CPU), cpu, cuda or mps.
            dtype: auto (the one that the device is fast at), float32, bfloat16, float16 or float64.

        Returns:
            The model in evaluation mode.

        Raises:
            ModelError: There is no such model, its weights are not whole, or it is of another family.
            ConfigError: The device is not there.
        """
        if name is not None and name != self.config.name:
            self.config = self._checked(describe_model(resolve_name(name)))
        settings = ModelSettings(name=self.config.name)
        resolved = resolve_name(self.config.location)
        _, config = read_config(settings, name=resolved)
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        spread = {} if device != "auto" else self._spread(config, place, kind)
        model, missing = read_weights(
            model_class(config), config, settings, resolved.location, dtype=kind, **spread
        )
        if missing:
            raise ModelError(
                f"the weights of '{self.config.name}' lack {', '.join(missing[:5])}, which {type(model).__name__} has"
            )
        model = (model if spread else model.to(place)).eval()
        self._family = map_model(model)
        spot_check(model, self._family)
        if self.config.facts.reads_tokens:
            self.tokenizer = read_tokenizer(settings, resolved.location)
            if self.tokenizer.pad_token_id is None:
                self.tokenizer.pad_token = self.tokenizer.eos_token  # pads are masked by position
            self.alignment = measure_alignment(self.tokenizer)
        self._find_model = lambda: model
        return model  # type: ignore[no-any-return]

    def hand_over(self) -> None:
        """Leave the model to whoever else holds it, a cache: this adapter finds it only as long as it lives there."""
        self._find_model = weakref.ref(self._loaded())

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that the model's parameters take in a dtype.

        Args:
            dtype: The dtype.

        Returns:
            Bytes.
        """
        return self.config.num_parameters * dtype.itemsize

    @property
    def family(self) -> FamilyMap:
        """The map of the loaded model."""
        self._loaded()
        assert self._family is not None
        return self._family

    def get_layer_mapping(self, stack: str | None = None) -> LayerMapping:
        """Where the parts of the model are.

        Args:
            stack: Tell the parts of one stack only, such as "decoder"; needs a loaded model.

        Returns:
            The paths.
        """
        if stack is None:
            return self.config.layer_mapping
        return LayerMapping.of(
            self.family, main_stack(self.model, self.family), stack=choose_stack(self.family, stack)
        )

    def extract_activations(
        self, texts: Iterable[str], layers: Iterable[int], *, stack: str | None = None, **options: Any
    ) -> Activations[Any]:
        """What chosen blocks put out for texts.

        Args:
            texts: What the model reads.
            layers: Layers, from 0; `layer i` is the output of block i.
            stack: A stack of the model; None takes the one that reads the texts.
            options: As in `peftlab.inspection.activations.extract_activations`: pooling, decoder_texts, max_length,
                batch_tokens, dtype, output, unproven.

        Returns:
            `layer_i` to values (rows, hidden): a row for every token, pads left out; `rows_of(text)` tells which.
        """
        texts = repeatable(texts)
        _, _, stack = self._reads(texts, stack)
        return extract_activations(
            self._loaded(), self._reader(), texts, layers, family=self.family, stack=stack, **options
        )

    def get_attention_patterns(
        self,
        texts: Iterable[str] | None,
        layers: Iterable[int] | None = None,
        *,
        stack: str | None = None,
        **options: Any,
    ) -> AttentionPatterns:
        """Who looks at whom.

        Args:
            texts: What the model reads; None where `inputs` are among the options.
            layers: Layers, from 0; None takes all that have attention.
            stack: A stack of the model; None takes the one that reads the texts.
            options: As in `peftlab.inspection.attention.get_attention_patterns`: heads, kind, decoder_texts, inputs,
                max_length.

        Returns:
            The patterns; `weights` is `layer_i` to probabilities (batch, heads, query, key).
        """
        read, beside, stack = self._reads(repeatable(texts), stack)
        beside |= options.pop("inputs", None) or {}
        tokenizer = self.tokenizer if read is None else self._reader()
        return get_attention_patterns(
            self._loaded(),
            tokenizer,
            read,
            layers,
            family=self.family,
            stack=stack,
            inputs=beside or None,
            **options,
        )

    def norm_statistics(
        self,
        texts: Iterable[str],
        layers: Iterable[int] | None = None,
        *,
        stack: str | None = None,
        decoder_texts: Iterable[str] | None = None,
        max_length: int | None = None,
    ) -> list[NormStatistics]:
        """What the norms do to the hidden states of texts: RMSNorm against LayerNorm.

        Args:
            texts: One batch.
            layers: Layers, from 0; None takes all.
            stack: A stack of the model; None takes the one that reads the texts.
            decoder_texts: What the decoder has written, for a decoder's norms.
            max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.

        Returns:
            One entry for each norm, in the model's order.
        """
        read, beside, stack = self._reads(repeatable(texts), stack)
        model, stack = self._loaded(), choose_stack(self.family, stack)
        decoder = side_of(model, self.family, stack) == "decoder_"
        tokenizer = self.tokenizer if read is None else self._reader()
        inputs = model_inputs(
            model,
            tokenizer,
            read,
            decoder_texts=decoder_texts,
            inputs=beside,
            needs_decoder=decoder,
            max_length=max_length,
        )
        side = "decoder_" if decoder else ""
        mask = (
            inputs.get(f"{side}attention_mask", torch.ones_like(inputs[f"{side}input_ids"])) if read else None
        )
        with evaluation_mode(model):
            return norm_statistics(
                model,
                self.family,
                inputs,
                stack=stack,
                layers=None if layers is None else list(layers),
                real=None if mask is None else mask.bool(),
            )

    def optimize_memory(
        self, texts: Iterable[str] | None = None, *, max_length: int | None = None
    ) -> MemoryOptimization:
        """Switch gradient checkpointing on, and tell what it saves of this model.

        It saves nothing in inference, and of a training step what is measured here on texts, one batch of them.

        Args:
            texts: Texts (images for a model that sees) to measure on; None measures nothing and says so.
            max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.

        Returns:
            What it saves.

        Raises:
            ModelError: The model has no checkpointing, or its device does not tell its memory.
            DataError: No texts, or what the model cannot read.
        """
        model = self._loaded()
        if texts is None:
            switch_checkpointing(model, True)
            return MemoryOptimization(gradient_checkpointing=True)
        texts = repeatable(texts)
        read, beside, _ = self._reads(texts, None)
        tokenizer = self.tokenizer if read is None else self._reader()
        target = read if self.config.facts.is_encoder_decoder else None  # any text will do to measure
        inputs = model_inputs(
            model, tokenizer, read, inputs=beside, decoder_texts=target, max_length=max_length
        )
        num = next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        words = f"{num} given {'images' if read is None else 'texts'}"
        return measure_checkpointing(model, self.family, inputs, words=words)

    def unload(self) -> None:
        """Let go of the model."""
        self._find_model, self.tokenizer, self._family = _no_model, None, None

    def _checked(self, config: ModelConfig) -> ModelConfig:
        """Refuse a model of another family."""
        if config.family not in self.families:
            raise ModelError(
                f"'{config.name}' is a {config.family.value} model ({config.architecture}); {type(self).__name__} works with"
                f" {', '.join(family.value for family in self.families)}. UniversalModelRegistry().create_adapter"
                " chooses the right adapter"
            )
        return config

    def _loaded(self) -> Any:
        """The model, which must be there."""
        model = self.model
        if model is None:
            raise ModelError(f"'{self.config.name}' is not loaded: call load_model first")
        return model

    def _spread(self, config: Any, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """How to read weights that one device has no room for; nothing where it has.

        Args:
            config: The model's config.
            place: The device.
            dtype: Of the weights.

        Returns:
            Options for `read_weights`.

        Raises:
            ModelError: There is no room for them on all devices and the host together.
        """
        room = find_room("host")
        if self.weights_bytes(dtype) <= room["cpu" if place.type != "cuda" else place.index or 0]:
            return {}
        placement = place_model(
            empty_model(config), name=self.config.name, dtype=dtype, room=room, offload="host"
        )
        return {"device_map": placement.device_map}

    def _reader(self) -> Any:
        """The tokenizer, which must be there."""
        self._loaded()
        if self.tokenizer is None:
            raise DataError(f"'{self.config.name}' ({self.config.architecture}) reads no text")
        return self.tokenizer

    def _reads(
        self, texts: Any, stack: str | None
    ) -> tuple[Sequence[str] | None, dict[str, Any], str | None]:
        """Texts, what is given to the model beside them, and the stack that reads them; None for the usual one."""
        return None if texts is None else as_texts(texts), {}, stack


def _no_model() -> None:
    """Where there is no model yet."""
