"""What a model is made of, in any architecture: its blocks, linears, units and shared weights."""

from llmkern.models.blocks import (
    DecoderBlocks,
    block_linears,
    cache_name,
    check_reads_text,
    check_writes_text,
    context_length,
    evaluation_mode,
    find_blocks,
    float32_parameters,
    run_on_tokens,
    text_config,
    vocabulary_size,
)
from llmkern.models.compute import (
    cast_floats,
    chosen_dtype,
    compute_dtype,
    compute_note,
    computing_in,
    whole_dtypes,
)
from llmkern.models.depth import check_depth, keep_blocks
from llmkern.models.reload import check_reload
from llmkern.models.resize import (
    adopt_settings,
    changed_config,
    empty_like,
    head_counts,
    keep_units,
    resize_blocks,
    set_width,
    set_widths,
    skeleton,
    unit_overrides,
    write_widths,
)
from llmkern.models.share import left_share
from llmkern.models.sources import Source, find_sources, fold, scale_columns
from llmkern.models.units import Units, find_units

__all__ = [
    "DecoderBlocks",
    "Source",
    "Units",
    "adopt_settings",
    "block_linears",
    "cache_name",
    "cast_floats",
    "changed_config",
    "check_depth",
    "check_reads_text",
    "check_reload",
    "check_writes_text",
    "chosen_dtype",
    "compute_dtype",
    "compute_note",
    "computing_in",
    "context_length",
    "empty_like",
    "evaluation_mode",
    "find_blocks",
    "find_sources",
    "find_units",
    "float32_parameters",
    "fold",
    "head_counts",
    "keep_blocks",
    "keep_units",
    "left_share",
    "resize_blocks",
    "run_on_tokens",
    "scale_columns",
    "set_width",
    "set_widths",
    "skeleton",
    "text_config",
    "unit_overrides",
    "vocabulary_size",
    "whole_dtypes",
    "write_widths",
]
