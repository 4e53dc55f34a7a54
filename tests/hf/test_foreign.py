"""Models with a quantizer of transformers: saved as the dense ones they have become, or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import llmkern

TOKENS = torch.arange(16).view(2, 8)


class Finished(HfQuantizer):
    """As transformers leaves one on a model whose GGUF weights it has expanded."""

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class Config:
    """Of a quantizer, with a method that no reader knows."""

    quant_method = "gguf"

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


def expanded() -> Any:
    """A dense model that still has its quantizer."""
    model = tiny(seed=0)
    model.hf_quantizer = Finished(Config(), pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = "gguf"
    model.config.quantization_config = Config()
    return model


class Foreign(nn.Module):
    """Another package's packed linear."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))


@pytest.mark.parametrize("verb", ["nothing", "rtn", "magnitude"])
def test_expanded_models_are_saved_as_they_are(verb: str, tmp_path: Path) -> None:
    model = expanded()
    if verb == "rtn":
        llmkern.quantize(model, "rtn", group_size=32)
    elif verb == "magnitude":
        llmkern.prune(model, "magnitude", sparsity=0.5)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        llmkern.save(model, tmp_path / "out")
        assert torch.equal(llmkern.load(tmp_path / "out")(TOKENS).logits, wanted)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert ("quantization_config" in config) == (verb == "rtn")
        if verb != "rtn":
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
            assert torch.equal(plain(TOKENS).logits, wanted)


def test_packed_weights_of_others_are_not_called_dense(tmp_path: Path) -> None:
    model = expanded()
    model.model.layers[0].mlp.up_proj = Foreign()
    with pytest.raises(ValueError, match="gguf and is not serializable"):
        llmkern.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_decoders_old_quantization_is_not_promised(tmp_path: Path) -> None:
    model = tiny(seed=0)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    llmkern.save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert llmkern.load(tmp_path / "out") is not None
