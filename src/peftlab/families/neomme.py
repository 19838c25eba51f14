"""NeoMME: the first and last layers of full attention hold value embeddings, so a twin needs one of these."""

TWIN = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
