"""How a config is made tiny: for each attribute of transformers' configs that is a size, its size in a twin.

Data, not code. An attribute that is not listed keeps its value; what one model type needs beyond this stands in
`families/`.
"""

from __future__ import annotations

HIDDEN, HEADS, HEAD, INTERMEDIATE, VOCABULARY, POSITIONS, EXPERTS = 64, 4, 16, 128, 128, 64, 4

_WIDTHS = """hidden_size d_model n_embd dim emb_dim embedding_dim attention_hidden_size word_embed_proj_dim embed_dim
lru_width pooler_hidden_size input_embedding_size output_embedding_size embedding_size hidden_size_global ple_embed_dim
backbone_hidden_size cross_attention_hidden_size prediction_head_size projection_dim d_latents
encoder_hidden_size d_embed entity_emb_size"""
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads
num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads index_n_heads linear_num_heads
swa_num_attention_heads num_self_attention_heads num_cross_attention_heads num_query_groups"""
_HEAD_WIDTHS = """head_dim kv_channels d_kv d_head dim_head v_head_dim qk_nope_head_dim index_head_dim linear_key_head_dim
linear_value_head_dim linear_head_dim swa_head_dim global_head_dim attention_head_size"""
_INTERMEDIATES = """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size dff dim_ff d_inner
feed_forward_size intermediate_size_mlp dense_intermediate_size hidden_dim shared_intermediate_size mlp_dim
shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size"""
_EXPERT_WIDTHS = "moe_intermediate_size expert_ffn_hidden_size moe_latent_size"
_EXPERTS = "num_experts n_routed_experts num_local_experts moe_num_experts"
_CHOSEN = """num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token zero_expert_num"""
_ONES = "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups num_shared_experts n_shared_experts"
_RANKS = """q_lora_rank kv_lora_rank o_lora_rank laurel_rank gated_norm_rank embedding_rank hc_lowrank adapter_rank
time_step_rank mamba_dt_rank router_hidden_size hidden_size_per_layer_input xpath_unit_hidden_size"""
_VOCABULARIES = """vocab_size vocab_size_per_layer_input decoder_vocab_size src_vocab_size tgt_vocab_size entity_vocab_size
pronunciation_vocab_size shape_vocab_size unpadded_vocab_size"""
_POSITIONS = """max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
max_target_positions model_max_length max_encoder_position_embeddings max_decoder_position_embeddings
original_max_position_embeddings sliding_window sliding_window_size attention_window_size index_topk
local_attention max_2d_position_embeddings"""
_LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
num_encoder_layers"""


def _each(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = (
    _each(_WIDTHS, HIDDEN)
    | _each(_HEADS, HEADS)
    | _each(_HEAD_WIDTHS, HEAD)
    | _each(_INTERMEDIATES, INTERMEDIATE)
    | _each(_EXPERT_WIDTHS, 32)
    | _each(_EXPERTS, EXPERTS)
    | _each(_CHOSEN, 2)
    | _each(_ONES, 1)
    | _each(_RANKS, 32)
    | _each(_VOCABULARIES, VOCABULARY)
    | _each(_POSITIONS, POSITIONS)
    | {
        "qk_rope_head_dim": 8,
        "qk_head_dim": 24,
        "rotary_dim": 8,
        "linear_num_key_heads": 2,
        "mamba_d_state": 8,
        "state_size": 8,
        "ssm_state_size": 8,
        "mamba_chunk_size": 8,
        "chunk_size": 8,
        "attention_chunk_size": 32,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "mamba_headdim": 16,
        "mamba_d_ssm": 128,
        "n_mamba_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
)
"""Attribute to its value in a twin; smaller values are kept."""

FILLED = frozenset(
    {"head_dim", "num_key_value_heads", "vocab_size", "n_routed_experts", "n_group", "topk_group"}
)
"""Attributes that some default configs leave open although the model needs them."""
LAYERS = frozenset(_LAYERS.split())
"""Attributes that count layers."""
KEY_VALUE_HEADS = frozenset({"num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads"})
"""Attributes that count key-value heads: all, one, or half of the query heads, as in the original."""
