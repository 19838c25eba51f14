"""BigBird-Pegasus: as BigBird, in its encoder."""

TWIN = {"attention_type": "original_full"}
ALSO = ({"block_size": 1, "num_random_blocks": 1},)
