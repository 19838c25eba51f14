"""Tiny random models and tokenizers for tests.

Norm gains, biases and gates are random: a default-initialised model hides faults (gains of one, biases of zero).
Importing this module keeps torch on one thread, so that tests side by side do not fight for the cores.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)

VOCABULARY = 64
"""Token ids of every tiny model."""
HIDDEN = 16
LABELS = 3

_GENERATING = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama(num_layers: int, **changes: Any) -> Any:
    config = T.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64, attention_bias=True,
        **_GENERATING | changes,
    )  # fmt: skip
    return T.LlamaForCausalLM(config)


def _gpt2(num_layers: int) -> Any:
    config = T.GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=num_layers, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, **_GENERATING,
    )  # fmt: skip
    return T.GPT2LMHeadModel(config)


def _bert(num_layers: int) -> Any:
    config = T.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=64, hidden_dropout_prob=0.0, pad_token_id=0,
        attention_probs_dropout_prob=0.0, num_labels=LABELS,
    )  # fmt: skip
    return T.BertForSequenceClassification(config)


def _t5(num_layers: int) -> Any:
    config = T.T5Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, num_layers=num_layers, d_kv=4, d_ff=24, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return T.T5ForConditionalGeneration(config)


def _opt(num_layers: int) -> Any:
    config = T.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=4, ffn_dim=24,
        max_position_embeddings=64, word_embed_proj_dim=HIDDEN, dropout=0.0, **_GENERATING,
    )  # fmt: skip
    return T.OPTForCausalLM(config)


def _gptj(num_layers: int) -> Any:
    config = T.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=num_layers,
        n_head=4,
        rotary_dim=2,
        n_positions=64,
        **_GENERATING,
    )
    return T.GPTJForCausalLM(config)


def _bloom(num_layers: int) -> Any:
    config = T.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=num_layers, n_head=4, **_GENERATING
    )
    return T.BloomForCausalLM(config)


def _phi3(num_layers: int) -> Any:
    config = T.Phi3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64, **_GENERATING,
    )  # fmt: skip
    return T.Phi3ForCausalLM(config)


def _bart(num_layers: int) -> Any:
    config = T.BartConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=num_layers, decoder_layers=num_layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=64, dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=2, **_GENERATING,
    )  # fmt: skip
    return T.BartForConditionalGeneration(config)


def _distilbert(num_layers: int) -> Any:
    config = T.DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=num_layers, n_heads=4, hidden_dim=24, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS, pad_token_id=0,
    )  # fmt: skip
    return T.DistilBertForSequenceClassification(config)


def _mixtral(num_layers: int) -> Any:
    config = T.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=64, **_GENERATING,
    )  # fmt: skip
    return T.MixtralForCausalLM(config)


BUILDERS: dict[str, Callable[[int], Any]] = {
    "llama": _llama,
    "llama_tied": lambda num_layers: _llama(num_layers, tie_word_embeddings=True),
    "gpt2": _gpt2,
    "bert": _bert,
    "t5": _t5,
    "opt": _opt,
    "gptj": _gptj,
    "bloom": _bloom,
    "phi3": _phi3,
    "bart": _bart,
    "distilbert": _distilbert,
    "mixtral": _mixtral,
}
"""Name to a builder of that architecture."""

HEADS = dict.fromkeys(BUILDERS, "causal") | {
    "bert": "classification",
    "distilbert": "classification",
    "t5": "seq2seq",
    "bart": "seq2seq",
}
"""Name to what the model ends in."""

MAIN = ("llama", "llama_tied", "gpt2", "bert", "t5")
"""The architectures that every method is tried on."""


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw every parameter anew, gains around one and biases around zero among them.

    Args:
        model: Any model; changed in place.
        seed: Seeds the values.

    Returns:
        The model.
    """
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def build(name: str, num_layers: int = 2, *, seed: int = 0) -> Any:
    """A tiny random model.

    Args:
        name: A key of `BUILDERS`.
        num_layers: Layers of each stack.
        seed: Seeds the values.

    Returns:
        The model in evaluation mode.
    """
    return randomise(BUILDERS[name](num_layers), seed).eval()


def inputs(name: str, *, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids for one forward pass, without labels.

    Args:
        name: A key of `BUILDERS`.
        batch: Rows.
        length: Tokens of a row.
        seed: Seeds the tokens.

    Returns:
        Arguments of the model's forward.
    """
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=source)
    batch_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if HEADS[name] == "seq2seq":
        batch_inputs["decoder_input_ids"] = torch.randint(
            3, VOCABULARY, (batch, length - 2), generator=source
        )
    return batch_inputs


def training_inputs(name: str, *, batch: int = 2, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same with labels, for a backward pass."""
    made = inputs(name, batch=batch, length=length, seed=seed)
    decoder = made.pop("decoder_input_ids", None)
    if HEADS[name] == "classification":
        return made | {"labels": torch.arange(batch) % LABELS}
    return made | {"labels": made["input_ids"].clone() if decoder is None else decoder}


_TEXT = """the a cat dog bird sits runs flies on under over mat house tree and or red blue green small big
name food price area Alimentum Aromi Blue Spice cheap high low riverside Say : = . ,"""
WORDS = _TEXT.split()
"""What the tiny tokenizers know."""


def tokenizer(
    *, pad_is_eos: bool = False, byte_level: bool = False, opens: bool = True, closes: bool = False
) -> Any:
    """A tiny tokenizer made on the fly.

    Args:
        pad_is_eos: Whether the end-of-sequence token doubles as pad.
        byte_level: A byte-pair tokenizer that reproduces every text; else one of whole words.
        opens: Whether texts begin with the beginning-of-sequence token.
        closes: Whether texts end with the end-of-sequence token, as T5's and BERT's do.

    Returns:
        A transformers tokenizer of at most `VOCABULARY` tokens (byte level: 300).
    """
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if byte_level:
        made = Tokenizer(models.BPE(unk_token=None))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        made.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    else:
        vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = ["<s>"] * opens + ["$A"] + ["</s>"] * closes
    made.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>" if pad_is_eos else "<pad>",
    )


def save_model(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """A tiny model and its tokenizer as a local folder.

    Args:
        folder: Where; made if needed.
        name: A key of `BUILDERS`.
        changes: Arguments of `tokenizer`.

    Returns:
        The folder.
    """
    build(name).save_pretrained(folder)
    tokenizer(closes=HEADS[name] != "causal", opens=HEADS[name] == "causal", **changes).save_pretrained(
        folder
    )
    return folder
