"""Checkpoint formats: one file and one entry of `WIRES` each."""

from llmkern.models.replace import like
from llmkern.wire._wire import Reader, TakenOver, Wire
from llmkern.wire.pending import fill_pending, leave_pending
from llmkern.wire.wires import (
    WIRES,
    packed_layers,
    reading_wire,
    record_formats,
    use_wire,
    writing_wire,
)

__all__ = [
    "WIRES",
    "Reader",
    "TakenOver",
    "Wire",
    "fill_pending",
    "leave_pending",
    "like",
    "packed_layers",
    "reading_wire",
    "record_formats",
    "use_wire",
    "writing_wire",
]
