"""A tiny model with tokens for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    model = tiny_models.tiny(seed=0, num_hidden_layers=4, vocab_size=61)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Calibration windows, int64 [12, 16]."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 61, (12, 16), generator=generator)
    save_file({"input_ids": windows}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Evaluation windows, int64 [4, 16]."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 61, (4, 16), generator=generator)
    save_file({"input_ids": windows}, tmp_path / "held_out.safetensors")
    return tmp_path / "held_out.safetensors"
