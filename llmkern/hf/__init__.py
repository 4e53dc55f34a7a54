"""Hugging Face checkpoints: save, load, and take over models that transformers has loaded."""

from llmkern.hf._sparse24 import accelerate_sparse
from llmkern.hf.accelerate import accelerate
from llmkern.hf.load import load, load_tokenizer
from llmkern.hf.save import save

__all__ = ["accelerate", "accelerate_sparse", "load", "load_tokenizer", "save"]
