"""Reformer: masked only where it does not decode; axial positions have to multiply to the length and sum to the width."""

TWIN = {
    "is_decoder": False,
    "axial_pos_embds": False,
    "attn_layers": ["local", "lsh", "local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 2,
}
