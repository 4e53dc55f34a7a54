"""Benchmarks of EleutherAI's harness (`lm_eval`) on a model as it is loaded here, packed or not."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What is kept of the harness's answer; the rest repeats prompts and settings at length.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class Tasks:
    """Tasks of the harness, found by their names."""

    def __init__(self, names: Sequence[str], include_path: str | Path | None = None) -> None:
        """Find them.

        Args:
            names: of tasks or groups of them, or patterns such as "arc_*".
            include_path: directory with tasks of one's own, YAML files as the harness describes them.

        Raises:
            ValueError: lm_eval is not installed, a name that it does not know (the nearest is named), a
                directory that is not there.
        """
        _module("lm_eval")
        if include_path is not None and not Path(include_path).is_dir():
            raise ValueError(f"include_path: got {str(include_path)!r}, expected a directory")
        place = None if include_path is None else str(include_path)
        self._manager = _module("lm_eval.tasks").TaskManager(include_path=place)
        self.names: list[str] = []
        known = list(self._manager.all_tasks)
        for name in names:
            found = [name] if name in known else list(self._manager.match_tasks([name]))
            if not found:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "which lm_eval has not"
                raise ValueError(f"tasks: got {name!r}, {hint}")
            self.names += [task for task in found if task not in self.names]
        if not self.names:
            raise ValueError("tasks: got none, expected names such as hellaswag, arc_easy")

    def run(
        self,
        model: Any,
        tokenizer: Any,
        *,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Run them.

        Args:
            model: a transformers causal language model, compressed or not.
            tokenizer: its own.
            num_fewshot: examples before each question; None: the task's own number.
            limit: questions per task, or below 1 the fraction of them; None: all.
            batch_size: texts per forward.
            seed: of the choice of examples.

        Returns:
            Of the harness's answer: "results" (task -> {"metric,filter": value}), "groups", "versions",
            "n-shot", "n-samples", "higher_is_better".

        Raises:
            ValueError: no tokenizer, a number out of range.
        """
        if tokenizer is None:
            raise ValueError("tokenizer: got None, expected a model with its tokenizer")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit: got {limit}, expected a positive number")
        if num_fewshot is not None and num_fewshot < 0:
            raise ValueError(f"num_fewshot: got {num_fewshot}, expected at least 0")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        harness = _module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size
        )
        answer = _module("lm_eval").simple_evaluate(
            model=harness,
            tasks=self.names,
            num_fewshot=num_fewshot,
            limit=limit if limit is None or limit < 1 else int(limit),
            task_manager=self._manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        return {name: answer[name] for name in _KEPT if name in answer}


def figures(answer: dict[str, Any]) -> list[tuple[str, str, float | str, float | None]]:
    """(task, metric, value, standard error or None) of an answer of `Tasks.run`, in its order."""
    lines = []
    for task, entries in answer["results"].items():
        for key, value in entries.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = entries.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            lines.append((task, name, value, error if isinstance(error, float) else None))
    return lines


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            "tasks: need the package lm_eval, which cannot be imported "
            f"({error}): pip install 'llmkern[eval]'"
        ) from error
