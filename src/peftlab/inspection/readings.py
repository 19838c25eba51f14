"""What a model does with texts: activations of every layer, attention of every head, over tokens and over words.

Each stack that reads text is read. A decoder of an encoder-decoder reads the same text as its encoder where none is given,
as if it were to copy it. What a model does not let be seen becomes a note with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from peftlab.errors import ModelError
from peftlab.family import FamilyMap
from peftlab.inspection.activations import extract_activations
from peftlab.inspection.attention_choice import Kind, mixers
from peftlab.inspection.attention_statistics import HeadStatistics, get_attention_statistics
from peftlab.inspection.images import blank_images
from peftlab.inspection.shards import Activations
from peftlab.inspection.text_batches import TextBatches
from peftlab.inspection.tokenized import TokenizedText, find_words
from peftlab.model_facts import reader_of

MASSIVE_MAGNITUDE, MASSIVE_RATIO = 100.0, 1000.0
"""An activation is massive above both, the ratio being to the median magnitude of its layer: Sun et al. 2024,
arXiv 2402.17762, section 2."""
_TOP = 3
_STATISTICS = (
    "entropy",
    "sink_mass",
    "previous_token_mass",
    "same_token_mass",
    "distance",
    "learnt_sink_mass",
)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Texts:
    """What a model is given to read.

    Attributes:
        read: The texts.
        written: What a decoder has written, one for each; None takes the texts themselves.
        layers: Layers whose attention is kept word by word; None takes the first, the middle and the last.
    """

    read: tuple[str, ...]
    written: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None


@dataclass(slots=True)
class Readings:
    """What was seen.

    Attributes:
        stacks: One mapping of plain values for each stack that reads text.
        arrays: Name to array, for what is too large for them.
        notes: What could not be seen, and why.
    """

    stacks: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, FloatArray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_texts(model: nn.Module, tokenizer: Any, family: FamilyMap, texts: Texts) -> Readings:
    """Run a model on texts and see what every stack does with them.

    Args:
        model: A model with weights, bare or wrapped by peft.
        tokenizer: Its tokenizer.
        family: Its map.
        texts: What it reads.

    Returns:
        The readings.

    Raises:
        DataError: A text has no tokens or too many.
    """
    seen = Readings()
    extracted: dict[str, Activations[Any]] = {}
    for stack in text_stacks(model, family):
        written = written_for(model, stack, texts)
        try:
            extracted[stack] = extract_activations(
                model, tokenizer, texts.read, range(family.num_outputs(stack)),
                family=family, stack=stack, decoder_texts=written, unproven=True,
            )  # fmt: skip
        except ModelError as error:
            seen.notes.append(f"activations of {stack}: {error}")
            continue
        if not extracted[stack].proof.startswith("equal"):
            seen.notes.append(
                f"activations of {stack} are what its blocks put out, which is not proved to be the model's hidden states:"
                f" {extracted[stack].proof}"
            )
        tokens = [
            row.read
            for row in TextBatches(model, tokenizer, texts.read, decoder_texts=written).read(
                0, len(texts.read)
            )
        ]
        seen.stacks.append(
            _reading(extracted[stack], stack, [_text(text, tokenizer) for text in tokens], seen)
        )
    for reading in seen.stacks:
        for kind in _kinds(family, reading["stack"]):
            _attention(model, tokenizer, family, texts, reading, kind, extracted, seen)
    return seen


def read_words(
    model: nn.Module, tokenizer: Any, family: FamilyMap, texts: Texts
) -> tuple[str, Activations[Any]]:
    """The activations of every layer of the first stack that reads text, as one vector for each word.

    Args:
        model: A model with weights.
        tokenizer: Its tokenizer.
        family: Its map.
        texts: What it reads.

    Returns:
        The stack's name and its activations.

    Raises:
        DataError: A text has no tokens or too many.
        ModelError: The model does not keep one vector for each token.
    """
    stack = text_stacks(model, family)[0]
    found = extract_activations(
        model, tokenizer, texts.read, range(family.num_outputs(stack)), family=family, stack=stack,
        pooling="word", decoder_texts=written_for(model, stack, texts), unproven=True,  # as `read_texts` notes
    )  # fmt: skip
    return stack, found


def text_stacks(model: nn.Module, family: FamilyMap) -> list[str]:
    """The stacks that read text: not those whose own tower reads pixels, nor those of a model that reads sound.

    Args:
        model: The mapped model, on any device.
        family: Its map.

    Returns:
        Names from the map's stacks, in order.
    """
    found = []
    for stack in family.stacks:
        ids, pixels = (reader_of(model, family, stack, name) for name in ("input_ids", "pixel_values"))
        if ids is not None and (pixels is None or len(ids) > len(pixels)):
            found.append(stack)
    return found


def written_for(model: Any, stack: str, texts: Texts) -> tuple[str, ...] | None:
    """What a stack reads besides the texts.

    Args:
        model: The model.
        stack: The stack.
        texts: What is read.

    Returns:
        The decoder's texts; None for a stack that is no decoder beside an encoder.
    """
    beside = bool(getattr(model.config, "is_encoder_decoder", False)) and stack != "encoder"
    return (texts.written or texts.read) if beside else None


def shown_layers(with_attention: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    """The layers whose attention is shown word by word.

    Args:
        with_attention: Layers that have attention, in order.
        wanted: What was asked for; None takes the first, the middle and the last.

    Returns:
        Layers, in order.
    """
    if wanted is not None:
        return sorted(set(wanted) & set(with_attention))
    count = len(with_attention)
    return sorted({with_attention[i] for i in (0, count // 2, count - 1)}) if count else []


def _kinds(family: FamilyMap, stack: str) -> list[Kind]:
    """The kinds of attention that a stack has."""
    kinds: tuple[Kind, Kind] = ("self", "cross")
    return [kind for kind in kinds if mixers(family, stack, kind)]


# -- activations --------------------------------------------------------------------------------------------------


def _reading(
    found: Activations[Any], stack: str, texts: list[dict[str, Any]], seen: Readings
) -> dict[str, Any]:
    """What one stack's activations show."""
    layers = [found[name].float().numpy() for name in found]
    name = f"{stack}.norms"
    seen.arrays[name] = np.stack([np.linalg.norm(layer, axis=1) for layer in layers])
    return {
        "stack": stack,
        "texts": texts,
        "norms": name,
        "layers": [
            _layer(number, layer, layers[number + 1] if number + 1 < len(layers) else None, found.rows)
            for number, layer in enumerate(layers)
        ],
        "attention": [],
    }


def _text(tokens: TokenizedText, tokenizer: Any) -> dict[str, Any]:
    """One text with its tokens, each as the characters it stands for or else its own spelling, and its words."""
    text = tokens.text
    return {
        "text": text,
        "tokens": [
            text[start:end] if start < end else str(tokenizer.convert_ids_to_tokens(token))
            for token, (start, end) in zip(tokens.ids.tolist(), tokens.offsets.tolist(), strict=True)
        ],
        "words": [text[start:end] for start, end in find_words(text).tolist()],
    }


def _layer(number: int, layer: FloatArray, following: FloatArray | None, rows: Any) -> dict[str, Any]:
    """Numbers of one layer over all tokens; None for what is no number."""
    norms = np.linalg.norm(layer, axis=1)
    magnitudes = np.abs(layer)
    median = _finite(np.median(magnitudes))
    dimensions = [
        _dimension(int(dimension), magnitudes[:, dimension], median, rows)
        for dimension in np.argsort(magnitudes.max(axis=0))[::-1][:_TOP]
    ]
    cosine = None
    if following is not None and following.shape == layer.shape:
        lengths = norms * np.linalg.norm(following, axis=1)
        both = lengths > 0
        cosine = (
            _finite(((layer * following).sum(axis=1)[both] / lengths[both]).mean()) if both.any() else None
        )
    return {
        "layer": number,
        "median_norm": _finite(np.median(norms)),
        "largest_norm": _finite(norms.max()),
        "median_magnitude": median,
        "top_dimensions": dimensions,
        "massive": [
            found["dimension"]
            for found in dimensions
            if (found["magnitude"] or 0) > MASSIVE_MAGNITUDE and (found["ratio"] or 0) > MASSIVE_RATIO
        ],
        "cosine_to_next": cosine,
    }


def _dimension(dimension: int, magnitudes: FloatArray, median: float | None, rows: Any) -> dict[str, Any]:
    """Where one dimension is largest."""
    row = int(magnitudes.argmax())
    return {
        "dimension": dimension,
        "magnitude": _finite(magnitudes[row]),
        "ratio": _finite(magnitudes[row] / median) if median else None,
        "text": int(rows["text"][row]),
        "token": int(rows["token_start"][row]),
    }


def _finite(value: Any) -> float | None:
    """A number for JSON; None for NaN and the infinities."""
    return float(value) if np.isfinite(value) else None


# -- attention ----------------------------------------------------------------------------------------------------


def _attention(
    model: nn.Module,
    tokenizer: Any,
    family: FamilyMap,
    texts: Texts,
    reading: dict[str, Any],
    kind: Kind,
    extracted: Mapping[str, Activations[Any]],
    seen: Readings,
) -> None:
    """What the heads of one stack do; into the reading, and the maps of chosen layers into the arrays."""
    stack = reading["stack"]
    source = stack if kind == "self" else next((name for name in extracted if name != stack), None)
    words, key_words = (
        [found.rows[found.rows_of(i)]["word"].tolist() for i in range(len(texts.read))]
        for found in (extracted[stack], extracted[source or stack])
    )
    try:
        statistics = get_attention_statistics(
            model, tokenizer, texts.read, kind=kind, stack=stack, family=family,
            words=words if source else None, key_words=key_words, decoder_texts=written_for(model, stack, texts),
            inputs=blank_images(model, 1),
        )  # fmt: skip
    except ModelError as error:
        seen.notes.append(f"{kind} attention of {stack}: {error}")
        return
    numbers = {int(name.removeprefix("layer_")): heads for name, heads in statistics.layers.items()}
    maps = dict(_maps(numbers, shown_layers(list(numbers), texts.layers), f"{stack}.{kind}"))
    seen.arrays |= maps
    reading["attention"].append(
        {
            "kind": kind,
            "source": statistics.source,
            "note": statistics.note,
            "layers": [_head_numbers(layer, heads, same=kind == "self") for layer, heads in numbers.items()],
            "maps": list(maps),
            "keys_of": source,
        }
    )


def _maps(
    numbers: Mapping[int, HeadStatistics], layers: Sequence[int], name: str
) -> Iterator[tuple[str, FloatArray]]:
    """The word-by-word maps of chosen layers, (heads, query words, key words), by name."""
    for layer in layers:
        for text, matrix in enumerate((numbers[layer].words or ()) if layer in numbers else ()):
            if matrix.numel():
                yield f"{name}.layer_{layer}.text_{text}", matrix.numpy()


def _head_numbers(layer: int, heads: HeadStatistics, *, same: bool) -> dict[str, Any]:
    """The statistics of one layer: for each head the mean over texts."""
    facts: dict[str, Any] = {"layer": layer}
    for name in _STATISTICS:
        values = getattr(heads, name)
        if values is not None:
            facts[name] = _means(values.double().numpy())
    by_word = [
        _word_numbers(matrix.double().numpy(), same=same) for matrix in heads.words or () if matrix.numel()
    ]
    for name in by_word[0] if by_word else ():
        facts[name] = _means(np.stack([numbers[name] for numbers in by_word]))
    return facts


def _word_numbers(heads: npt.NDArray[np.float64], *, same: bool) -> dict[str, npt.NDArray[np.float64]]:
    """What heads do between words, (heads,): comparable between tokenizers.

    Args:
        heads: Word-by-word attention of one text, (heads, query words, key words); rows sum to at most 1.
        same: Whether queries and keys are the same words.

    Returns:
        word_entropy in nats, with all tokens of no word as one more word; no_word_mass; and for the same words
        previous_word_mass, same_word_mass and word_distance (of the mass that is on words).
    """
    on_words = heads.sum(axis=-1)
    rest = np.clip(1 - on_words, 0, 1)
    every = np.concatenate([heads, rest[..., None]], axis=-1)
    logarithms = np.log(every, where=every > 0, out=np.zeros_like(every))
    found = {  # the row of a word without tokens is blank
        "word_entropy": np.nanmean(-(every * logarithms).sum(axis=-1), axis=-1),
        "no_word_mass": np.nanmean(rest, axis=-1),
    }
    if not same:
        return found
    places = np.arange(heads.shape[-1])
    distance = np.abs(np.arange(heads.shape[-2])[:, None] - places)
    with np.errstate(invalid="ignore", divide="ignore"):
        found["word_distance"] = np.nansum(heads * distance, axis=(-2, -1)) / np.nansum(on_words, axis=-1)
    found["same_word_mass"] = np.nanmean(np.diagonal(heads, axis1=-2, axis2=-1), axis=-1)
    before = np.diagonal(heads, offset=-1, axis1=-2, axis2=-1)
    found["previous_word_mass"] = (
        np.nanmean(before, axis=-1) if before.size else np.full(len(heads), np.nan)
    )  # one word has none before it
    return found


def _means(values: npt.NDArray[np.float64]) -> list[float | None]:
    """The mean over texts (the first axis) for each head, blanks left out; None where all are blank."""
    known = np.isfinite(values)
    totals, counts = np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0)
    return [float(total / count) if count else None for total, count in zip(totals, counts, strict=True)]
