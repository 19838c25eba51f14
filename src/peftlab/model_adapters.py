"""The adapters of the families: what each kind of model has beyond what all have.

Special positions, a decoder, task prefixes, conversations, images, a domain; everything else is in `universal_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from peftlab.errors import ConfigError, DataError, ModelError
from peftlab.inspection.attention import AttentionPatterns
from peftlab.inspection.block_outputs import evaluation_mode
from peftlab.inspection.norm_statistics import watched_modules
from peftlab.inspection.shards import ROW, Activations
from peftlab.inspection.words import align_words, special_positions
from peftlab.model_config import ModelConfig
from peftlab.model_facts import ModelFamily, main_config, main_stack, reader_of, stack_reading
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

    def special_positions(self, texts: Sequence[str]) -> list[dict[int, tuple[str, ...]]]:
        """Where the model reads special tokens: [CLS], [SEP], [MASK] and their like.

        Args:
            texts: The texts; a mask in them is written as the tokenizer writes it.

        Returns:
            For each text position to the names of the token there.
        """
        tokenizer = self._reader()
        return [special_positions(tokenizer, tokenizer(text)["input_ids"]) for text in texts]


class DomainSpecificAdapter(BERTModelAdapter):
    """CodeBERT, SciBERT, BioBERT: BERT or RoBERTa, pretrained for one field."""

    def vocabulary_fit(self, texts: Sequence[str]) -> dict[str, float]:
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
        for text in texts:
            spans = align_words(tokenizer, text).words.tokens
            lengths += (spans[:, 1] - spans[:, 0]).tolist()
        if not lengths:
            raise DataError("there is no word in the texts")
        whole = sum(length == 1 for length in lengths)
        return {"tokens_per_word": sum(lengths) / len(lengths), "whole_words": whole / len(lengths)}


class EncoderDecoderAdapter(UniversalModelAdapter):
    """A model with an encoder and a decoder. What the decoder reads is given, or is what the model itself writes."""

    families: ClassVar[tuple[ModelFamily, ...]] = (ModelFamily.T5, ModelFamily.BART)

    def write(self, texts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """What the model writes for texts, greedily.

        Args:
            texts: What the encoder reads.
            max_new_tokens: Longest answer in tokens.

        Returns:
            One answer for each text.

        Raises:
            ModelError: The checkpoint has no head to write with.
        """
        model, tokenizer = self._loaded(), self._reader()
        if not model.can_generate():
            raise ModelError(
                f"'{self.config.name}' is a bare {type(model).__name__} and cannot write: give decoder_texts"
            )
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            written = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, max_length=None
            )
        return list(tokenizer.batch_decode(written, skip_special_tokens=True))

    def extract_activations(
        self, texts: Sequence[str], layers: Sequence[int], *, stack: str | None = None, **options: Any
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
        if stack == "decoder":
            options["decoder_texts"] = options.get("decoder_texts") or self.write(texts)
        return super().extract_activations(texts, layers, stack=stack, **options)

    def get_attention_patterns(
        self,
        texts: Sequence[str] | None,
        layers: Sequence[int] | None = None,
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
        decoder = stack == "decoder" or options.get("kind") == "cross"
        if decoder and texts is not None and not (options.get("decoder_texts") or options.get("inputs")):
            options["decoder_texts"] = self.write(texts)
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
        """
        model = self._loaded()
        if not (isinstance(images, torch.Tensor) and images.is_floating_point() and images.dim() == 4):
            import transformers

            try:
                processor = transformers.AutoImageProcessor.from_pretrained(
                    self.config.location, backend="pil"
                )
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"'{self.config.name}' has no image processor beside it: give pixel values (batch, channels, height,"
                    " width)"
                ) from error
            images = processor(images=list(images), return_tensors="pt")["pixel_values"]
        return images.to(model.device, model.dtype)  # type: ignore[no-any-return]

    def extract_activations(
        self, texts: Any, layers: Sequence[int], *, stack: str | None = None, **options: Any
    ) -> Activations[Any]:
        """What chosen blocks put out for images, or for texts where the model reads them.

        Args:
            texts: Images or texts.
            layers: Layers of the stack that reads them, from 0.
            stack: A stack of the model, for texts.
            options: For texts as in the base class; for images `pooling`: "token", a row for each position (a patch, or a
                token that the model adds), or "mean", one for each image.

        Returns:
            `layer_i` to values (rows, hidden); `rows_of(image)` tells which.

        Raises:
            ConfigError: There is no such layer or pooling.
            ModelError: A block puts out something else than one vector for each position.
        """
        if _are_texts(texts):
            return super().extract_activations(texts, layers, stack=stack, **options)
        pooling = options.pop("pooling", "token")
        _, inputs, stack = self._reads(texts, None)
        assert stack is not None
        blocks = self.family.blocks(stack)
        if (
            not layers
            or not set(layers) <= set(range(len(blocks)))
            or pooling not in ("token", "mean")
            or options
        ):
            raise ConfigError(
                f"layers {list(layers)}, pooling '{pooling}', options {sorted(options)}: of images this model has"
                f" layers 0 to {len(blocks) - 1}; pooling is token or mean; there are no other options"
            )
        paths = {f"layer_{layer}": blocks[layer].path for layer in sorted(set(layers))}
        reader = reader_of(self.model, self.family, stack, "pixel_values")
        calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with (
            torch.inference_mode(),
            evaluation_mode(self.model),
            watched_modules(self.model, paths.values(), calls),
        ):
            self.model.get_submodule(reader or "")(pixel_values=inputs["pixel_values"])
        return _image_rows({name: calls[path][1].cpu() for name, path in paths.items()}, stack, pooling)

    def _reads(self, texts: Any, stack: str | None) -> tuple[Any, dict[str, Any], str | None]:
        """Texts or None; pixels, which are blank beside texts; and the tower that reads them.

        Of two towers side by side (CLIP) the one that is not looked at must read something; no part of the other sees it.
        """
        model = self._loaded()
        beside = hasattr(model, "get_text_features")
        if _are_texts(texts):
            size = main_config(model.config).image_size
            blank = (
                {"pixel_values": torch.zeros(len(texts), 3, size, size, dtype=model.dtype)} if beside else {}
            )
            return texts, blank, stack or stack_reading(model, self.family, "input_ids")
        inputs = {"pixel_values": self.pixels(texts)}
        if beside:
            inputs["input_ids"] = torch.ones(len(inputs["pixel_values"]), 2, dtype=torch.long)
        return None, inputs, main_stack(model, self.family)


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


def _image_rows(values: dict[str, torch.Tensor], stack: str, pooling: str) -> Activations[torch.Tensor]:
    """Layers (batch, positions, hidden) as rows."""
    shapes = {tuple(tensor.shape[:2]) for tensor in values.values()}
    if len(shapes) > 1 or any(tensor.dim() != 3 for tensor in values.values()):
        raise ModelError(
            "the blocks asked for put out different numbers of positions, or not one vector for each: ask for one layer"
        )
    ((batch, positions),) = shapes
    if pooling == "mean":
        values, positions = {name: tensor.mean(dim=1, keepdim=True) for name, tensor in values.items()}, 1
    rows = np.zeros(batch * positions, ROW)
    rows["text"] = np.repeat(np.arange(batch), positions)
    rows["token_start"] = np.tile(np.arange(positions), batch)
    rows["token_end"] = rows["token_start"] + 1
    rows["word"] = -1
    return Activations({name: t.flatten(0, 1) for name, t in values.items()}, rows, batch, stack, pooling)
