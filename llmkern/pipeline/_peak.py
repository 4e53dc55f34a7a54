"""The largest amount of memory that a piece of work held."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_INTERVAL = 0.05  # seconds between two looks where the system keeps no maximum


class PeakMemory:
    """Context whose `bytes` is the peak inside it.

    On a GPU that of torch's allocator there, else the process's resident set: Linux keeps its maximum
    and can forget it (proc(5), clear_refs); where it cannot, a thread looks at the resident set.

    Attributes:
        bytes: the peak, known after the end of the context.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif not _forget_peak():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._thread is None:
            self.bytes = _kept_peak()
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(_INTERVAL):
                return


def _forget_peak() -> bool:
    """Let the maximum of the resident set begin anew; whether that can be done here."""
    try:
        before = _kept_peak()
        _RESET.write_text("5")
        # Some sandboxes take the request and do nothing.
        return 0 < _kept_peak() < before or _resident() >= before > 0
    except (OSError, ValueError):
        return False


def _kept_peak() -> int:
    return _status("VmHWM")


def _resident() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
