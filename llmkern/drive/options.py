"""Options that drivers share, and how keyword options find the dataclass that they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llmkern.drive.method import Method

_M = TypeVar("_M", bound=Method)


@dataclass(frozen=True)
class DataOptions:
    """How the calibration data is cut and fed.

    Attributes:
        samples: calibration windows.
        seq_len: tokens per window; None takes a tensor's own width, else 512.
        seed: of the choice of windows.
        batch_size: windows per forward.
        compute_dtype: that blocks are run in; "auto": float32 where the processor multiplies the model's
            own dtype slowly.
        text_field: field of the rows that holds their text, where the data has rows; None takes "text",
            a conversation or the longest prose, and says which.
    """

    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    batch_size: int = 8
    compute_dtype: str = "auto"
    text_field: str | None = None


def find_method(methods: Sequence[_M], name: str) -> _M:
    """The method of this name.

    Raises:
        ValueError: there is none.
    """
    for method in methods:
        if method.name == name:
            return method
    raise ValueError(
        f"method: got {name!r}, expected one of {', '.join(method.name for method in methods)}"
    )


def sort_options(
    method: Method, options: Mapping[str, Any], common: Any = DataOptions
) -> tuple[Any, Any]:
    """Sort keyword options into the method's dataclass and the one that all methods share.

    Args:
        method: whose options they are.
        options: by name, of either.
        common: the dataclass of the options that all methods share.

    Raises:
        ValueError: an option that belongs to neither, a value that the method's dataclass refuses.
    """
    known = [{f.name for f in dataclasses.fields(kind)} for kind in (method.options, common)]
    for name in options:
        if not any(name in names for names in known):
            expected = ", ".join(sorted(set().union(*known)))
            raise ValueError(
                f"{name}: not an option of method {method.name!r}, expected {expected}"
            )
    own, shared = ({k: v for k, v in options.items() if k in names} for names in known)
    return method.options(**own), common(**shared)
