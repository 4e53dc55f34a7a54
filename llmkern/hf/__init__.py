"""Hugging Face checkpoints: save, load, and take over models that transformers has loaded."""

from llmkern.hf._architecture import find_model_class, read_config
from llmkern.hf._sparse24 import accelerate_sparse
from llmkern.hf.accelerate import accelerate
from llmkern.hf.load import load, load_tokenizer
from llmkern.hf.save import save

__all__ = [
    "accelerate",
    "accelerate_sparse",
    "find_model_class",
    "load",
    "load_tokenizer",
    "read_config",
    "save",
]
