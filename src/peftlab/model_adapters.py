"""The adapters of the families: what each kind of model has beyond what all have.

Special positions, a decoder, task prefixes, conversations, images, a domain; everything else is in `universal_adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.inspection.attention import AttentionPatterns
from peftlab.inspection.attention_inputs import model_inputs
from peftlab.inspection.images import blank_images, image_activations, pixel_values
from peftlab.inspection.reading_limits import as_texts, repeatable
from peftlab.inspection.shards import Activations
from peftlab.inspection.words import align_words, special_positions
from peftlab.model_config import ModelConfig
from peftlab.model_facts import ModelFamily, main_stack, stack_reading
from peftlab.universal_adapter import UniversalModelAdapter

__all__ = [
    "BARTModelAdapter",
    "BERTModelAdapter",
    "DomainSpecificAdapter",
    "EncoderDecoderAdapter",
    "GPTModelAdapter",
    "LLaMAModelAdapter",
    "T5ModelAdapter",
    "UniversalModelAdapter",
    "VisionModelAdapter",
    "adapter_class",
]


class GPTModelAdapter(UniversalModelAdapter):
    """GPT-2, GPT-Neo, GPT-J, CodeGen and others that look back only, with LayerNorm."""

    families = (ModelFamily.GPT,)


class LLaMAModelAdapter(UniversalModelAdapter):
    """LLaMA, Alpaca, Vicuna, Mistral, Qwen, Gemma and others that look back only, with RMSNorm or a gated MLP."""

    families = (ModelFamily.LLAMA,)

    def as_conversation(self, message: str, *, system: str | None = None) -> str:
        """A message as the model was taught to see one, up to where its answer begins.

        Args:
            message: What a person says.
            system: What stands before the conversation.

        Returns:
            The text to give to the model.

        Raises:
            DataError: The tokenizer has no form for conversations (a base model, or one that only its card describes).
        """
        tokenizer = self._reader()
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of '{self.config.name}' has no chat template, so how it was taught to converse is not known"
            )
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": message})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


class BERTModelAdapter(UniversalModelAdapter):
    """BERT, RoBERTa, DistilBERT, DeBERTa and others that look both ways."""

    families = (ModelFamily.BERT,)

    def special_positions(self, texts: Iterable[str]) -> list[dict[int, tuple[str, ...]]]:
        """Where the model reads special tokens: [CLS], [SEP], [MASK] and their like.

        Args:
            texts: The texts; a mask in them is written as the tokenizer writes it.

        Returns:
            For each text position to the names of the token there.
        """
        tokenizer = self._reader()
        return [special_positions(tokenizer, tokenizer(text)["input_ids"]) for text in as_texts(texts)]


class DomainSpecificAdapter(BERTModelAdapter):
    """CodeBERT, SciBERT, BioBERT: BERT or RoBERTa, pretrained for one field."""

    def vocabulary_fit(self, texts: Iterable[str]) -> dict[str, float]:
        """How well the vocabulary fits texts of a field; compare with a general model's on the same texts.

        Args:
            texts: Texts of the field.

        Returns:
            "tokens_per_word", and "whole_words": the share of words that are one token.

        Raises:
            DataError: There is no word in the texts.
        """
        tokenizer = self._reader()
        lengths: list[int] = []
        for text in as_texts(texts):
            spans = align_words(tokenizer, text).words.tokens
            lengths += (spans[:, 1] - spans[:, 0]).tolist()
        if not lengths:
            raise DataError("there is no word in the texts")
        whole = sum(length == 1 for length in lengths)
        return {"tokens_per_word": sum(lengths) / len(lengths), "whole_words": whole / len(lengths)}


class EncoderDecoderAdapter(UniversalModelAdapter):
    """A model with an encoder and a decoder. What the decoder reads is given, or is what the model itself writes."""

    families: ClassVar[tuple[ModelFamily, ...]] = (ModelFamily.T5, ModelFamily.BART)

    def write(
        self, texts: Iterable[str], *, max_new_tokens: int = 20, max_length: int | None = None
    ) -> list[str]:
        """What the model writes for texts, greedily.

        Args:
            texts: What the encoder reads.
            max_new_tokens: Longest answer in tokens.
            max_length: Cut texts to so many tokens; None refuses a text that is longer than the model or its tokenizer says.

        Returns:
            One answer for each text.

        Raises:
            ModelError: The checkpoint has no head to write with.
            DataError: No texts, or what the model cannot read.
        """
        model, tokenizer = self._loaded(), self._reader()
        if not model.can_generate():
            raise ModelError(
                f"'{self.config.name}' is a bare {type(model).__name__} and cannot write: give decoder_texts"
            )
        inputs = model_inputs(model, tokenizer, texts, max_length=max_length)
        del inputs["decoder_input_ids"]  # generation begins by itself
        with torch.inference_mode():
            written = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, max_length=None
            )
        return list(tokenizer.batch_decode(written, skip_special_tokens=True))

    def extract_activations(
        self, texts: Iterable[str], layers: Iterable[int], *, stack: str | None = None, **options: Any
    ) -> Activations[Any]:
        """What chosen blocks of the encoder, or with `stack="decoder"` of the decoder, put out.

        Args:
            texts: What the encoder reads.
            layers: Layers, from 0.
            stack: "encoder" (the default) or "decoder".
            options: As in the base class; without `decoder_texts` the decoder reads what the model writes.

        Returns:
            `layer_i` to values (rows, hidden).
        """
        texts = repeatable(texts)
        if stack == "decoder" and options.get("decoder_texts") is None:
            options["decoder_texts"] = self.write(texts, max_length=options.get("max_length"))
        return super().extract_activations(texts, layers, stack=stack, **options)

    def get_attention_patterns(
        self,
        texts: Iterable[str] | None,
        layers: Iterable[int] | None = None,
        *,
        stack: str | None = None,
        **options: Any,
    ) -> AttentionPatterns:
        """Who looks at whom in the encoder; with `stack="decoder"` in the decoder; with `kind="cross"` across.

        Args:
            texts: What the encoder reads.
            layers: Layers, from 0.
            stack: "encoder" (the default) or "decoder".
            options: As in the base class; without `decoder_texts` the decoder reads what the model writes.

        Returns:
            The patterns.
        """
        texts = repeatable(texts)
        decoder = stack == "decoder" or options.get("kind") == "cross"
        given = options.get("decoder_texts") is not None or options.get("inputs")
        if decoder and texts is not None and not given:
            options["decoder_texts"] = self.write(texts, max_length=options.get("max_length"))
        return super().get_attention_patterns(texts, layers, stack=stack, **options)


class T5ModelAdapter(EncoderDecoderAdapter):
    """T5, Flan-T5, UL2, mT5 and others with an encoder, a decoder and RMSNorm."""

    families = (ModelFamily.T5,)

    @property
    def task_prefixes(self) -> dict[str, str]:
        """The prefixes that the checkpoint's config names: task to what stands before its texts; empty in many (Flan-T5)."""
        tasks: Mapping[str, Any] = getattr(self._loaded().config, "task_specific_params", None) or {}
        return {name: str(values["prefix"]) for name, values in tasks.items() if "prefix" in values}

    def with_task(self, texts: Sequence[str], task: str) -> list[str]:
        """Texts with a task's prefix before them.

        Args:
            texts: The texts.
            task: A task of `task_prefixes`, or a prefix that ends in a colon.

        Returns:
            The texts to give to the model.

        Raises:
            ConfigError: The checkpoint names no such task, and it is no prefix.
        """
        known = self.task_prefixes
        prefix = f"{task.rstrip()} " if task.rstrip().endswith(":") else known.get(task)
        if prefix is None:
            raise ConfigError(
                f"'{self.config.name}' names no task '{task}'; it names {', '.join(known) or 'none'}. A prefix of your own"
                " ends in a colon"
            )
        return [prefix + text for text in texts]


class BARTModelAdapter(EncoderDecoderAdapter):
    """BART, mBART, BARTpho, Pegasus, Marian and others with an encoder, a decoder and LayerNorm."""

    families = (ModelFamily.BART,)


class VisionModelAdapter(UniversalModelAdapter):
    """ViT, DeiT, BEiT, DINOv2, Swin, and CLIP and SigLIP, which read texts as well.

    Where the base class takes texts, images can be given: PIL images or arrays (height, width, channels), prepared by the
    checkpoint's own image processor, or a tensor (batch, channels, height, width) of floating-point numbers, taken as it is.
    """

    families = (ModelFamily.VISION,)

    def pixels(self, images: Any) -> torch.Tensor:
        """Images as the model reads them.

        Args:
            images: The images.

        Returns:
            Pixel values (batch, channels, height, width) on the model's device.

        Raises:
            ModelError: The checkpoint has no image processor.
            DataError: These are no images, or of a size that the model does not see.
        """
        return pixel_values(self._loaded(), self.family, images, location=self.config.location)

    def extract_activations(
        self, texts: Any, layers: Iterable[int], *, stack: str | None = None, **options: Any
    ) -> Activations[Any]:
        """What chosen blocks put out for images, or for texts where the model reads them.

        Args:
            texts: Images or texts.
            layers: Layers of the stack that reads them, from 0.
            stack: A stack of the model, for texts.
            options: For texts as in the base class; for images `pooling` and `unproven` as in
                `peftlab.inspection.images.image_activations`.

        Returns:
            `layer_i` to values (rows, hidden); `rows_of(image)` tells which.

        Raises:
            ConfigError: There is no such layer, pooling or option.
            DataError: These are no images, or of a size that the model does not see.
            ModelError: A block puts out something else than one vector for each position, or what is not proved to be the
                model's hidden states.
        """
        texts, layers = repeatable(texts), list(layers)
        if _are_texts(texts):
            return super().extract_activations(texts, layers, stack=stack, **options)
        given = {name: options.pop(name) for name in ("pooling", "unproven") if name in options}
        if options:
            raise ConfigError(
                f"options {', '.join(sorted(options))}: of images there are pooling and unproven"
            )
        _, inputs, _ = self._reads(texts, stack)
        return image_activations(self.model, self.family, inputs["pixel_values"], layers, **given)

    def _reads(self, texts: Any, stack: str | None) -> tuple[Any, dict[str, Any], str | None]:
        """Texts or None; pixels, which are blank beside texts; and the tower that reads them.

        Of two towers side by side (CLIP) the one that is not looked at must read something; no part of the other sees it.
        """
        model = self._loaded()
        if texts is None:
            return None, {}, stack
        if _are_texts(texts):
            return (
                texts,
                blank_images(model, len(texts)),
                stack or stack_reading(model, self.family, "input_ids"),
            )
        sees = main_stack(model, self.family)
        if stack not in (None, sees):
            raise ConfigError(
                f"stack '{stack}' sees no images: of images give stack='{sees}', or leave it out"
            )
        inputs = {"pixel_values": self.pixels(texts)}
        if hasattr(model, "get_text_features"):
            inputs["input_ids"] = torch.ones(len(inputs["pixel_values"]), 2, dtype=torch.long)
        return None, inputs, sees


def adapter_class(config: ModelConfig) -> type[UniversalModelAdapter]:
    """The adapter for a model.

    Args:
        config: What the model is.

    Returns:
        That of its domain, where it has one, else that of its family; the universal one for other models.
    """
    if config.domain and config.family in DomainSpecificAdapter.families:
        return DomainSpecificAdapter
    own = (
        GPTModelAdapter,
        BERTModelAdapter,
        T5ModelAdapter,
        LLaMAModelAdapter,
        BARTModelAdapter,
        VisionModelAdapter,
    )
    return next((adapter for adapter in own if config.family in adapter.families), UniversalModelAdapter)


def _are_texts(given: Any) -> bool:
    """Whether what a model is to read are texts."""
    return isinstance(given, str) or (
        isinstance(given, Sequence) and all(isinstance(item, str) for item in given)
    )
