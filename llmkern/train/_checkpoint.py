"""State of training on disk: weights, optimizer and random numbers as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmkern._files import sync_tree
from llmkern._json import numbers, to_json

_TENSORS, _STATE = "state.safetensors", "state.json"


class Checkpoint:
    """One directory that holds the newest state; the one before stays until the new one is whole."""

    def __init__(self, directory: Path) -> None:
        self._newest, self._next = directory / "newest", directory / "next"
        self._before = directory / "before"

    def save(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Write everything, then let it take the place of what was there."""
        if self._next.exists():
            shutil.rmtree(self._next)
        self._next.mkdir(parents=True)
        tensors = {"rng": torch.get_rng_state()}
        device = next(iter(_trained(module).values())).device
        if device.type == "cuda":  # dropout draws there
            tensors["rng_cuda"] = torch.cuda.get_rng_state(device)
        for name, weight in _trained(module).items():
            tensors[f"weight.{name}"] = weight.detach().cpu().contiguous()
            for key, value in optimizer.state.get(weight, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).cpu().contiguous()
        save_file(tensors, self._next / _TENSORS)
        (self._next / _STATE).write_text(to_json(state) + "\n")
        sync_tree(self._next)
        if self._newest.exists():
            # A process that was killed may have left one that was still to be deleted.
            shutil.rmtree(self._before, ignore_errors=True)
            os.replace(self._newest, self._before)
        os.replace(self._next, self._newest)
        shutil.rmtree(self._before, ignore_errors=True)

    def load(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Restore the newest state, or return None where there is none.

        Raises:
            ValueError: it was made with other settings, or for another model (the first difference is
                named); nothing is changed then.
        """
        # A process killed between two renames leaves only the state before.
        found = next((d for d in (self._newest, self._before) if (d / _STATE).is_file()), None)
        if found is None:
            return None
        state: dict[str, Any] = numbers(json.loads((found / _STATE).read_text()))
        for name, value in settings.items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{found}: {name}: the checkpoint was made with {state['settings'].get(name)}, this "
                    f"run has {value}; expected the same, or another directory"
                )
        tensors, trained = load_file(found / _TENSORS), _trained(module)
        stored = {
            k.removeprefix("weight."): t for k, t in tensors.items() if k.startswith("weight.")
        }
        _check_shapes(found, stored, trained)
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(stored[name])
        for key, value in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                entry, _, name = rest.partition(".")
                weight = trained[name]
                # Counters stay on the CPU, where torch's optimizers keep them.
                place = weight.device if value.shape == weight.shape else torch.device("cpu")
                optimizer.state[weight][entry] = value.to(place)
        torch.set_rng_state(tensors["rng"])
        device = next(iter(trained.values())).device
        if device.type == "cuda" and "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], device)
        return state


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _check_shapes(path: Path, stored: dict[str, Tensor], trained: dict[str, nn.Parameter]) -> None:
    got = {name: list(t.shape) for name, t in stored.items()}
    wanted = {name: list(p.shape) for name, p in trained.items()}
    odd = next((n for n in {**wanted, **got} if got.get(n) != wanted.get(n)), None)
    if odd is not None:
        raise ValueError(f"{path}: {odd}: got {got.get(odd)}, expected {wanted.get(odd)}")
