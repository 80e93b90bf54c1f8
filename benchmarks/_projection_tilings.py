"""Tilings of the indexer's projections. The module needs no Paddle."""

# for few tokens and for many: BLOCK_TOKENS, BLOCK_COLUMNS,
# BLOCK_HIDDEN, programs that share the hidden size, num_warps, num_stages
SPLIT = (
    *((16, 16, 128, 28, 4, 3), (16, 16, 128, 14, 4, 5), (16, 16, 256, 7, 4, 5)),
    *((16, 32, 128, 28, 4, 3), (16, 32, 128, 14, 4, 5), (16, 64, 128, 28, 4, 3)),
    *((32, 32, 128, 28, 4, 3), (32, 32, 128, 14, 4, 5), (64, 32, 128, 14, 4, 5)),
    *((64, 32, 128, 7, 4, 5), (64, 64, 128, 14, 8, 5), (64, 64, 128, 7, 8, 4)),
)
WHOLE = (64, 32, 128, 1, 4, 4), (64, 64, 64, 1, 4, 5), (128, 64, 64, 1, 8, 4)
