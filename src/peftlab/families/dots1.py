"""dots.llm1: the library's default config leaves the experts open."""

CONFIG = {
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
}
