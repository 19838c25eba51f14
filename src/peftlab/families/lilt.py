"""LiLT: six layout embeddings share the hidden width, and a quarter of it is the layout stream."""

TWIN = {"hidden_size": 96, "num_attention_heads": 4}
