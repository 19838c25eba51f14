"""BigBird: short rows take its full attention; a second twin with blocks of one token is there for the sparse one."""

TWIN = {"attention_type": "original_full"}
ALSO = ({"block_size": 1, "num_random_blocks": 1},)
