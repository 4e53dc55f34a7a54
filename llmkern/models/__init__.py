"""What a decoder block looks like, in any architecture: found by structure, never by name."""

from llmkern.models.blocks import (
    DecoderBlocks,
    block_linears,
    context_length,
    evaluation_mode,
    find_blocks,
    vocabulary_size,
)

__all__ = [
    "DecoderBlocks",
    "block_linears",
    "context_length",
    "evaluation_mode",
    "find_blocks",
    "vocabulary_size",
]
