"""The small language model that ships with llmkern, and the texts that go with it."""

from pathlib import Path

_MODEL_DIR = Path(__file__).parent / "stdlib-llama"


def bundled_model_dir() -> Path:
    """Returns the folder of the bundled model, to be passed to `from_pretrained`."""
    return _MODEL_DIR


def calibration_text() -> Path:
    """Returns a text file from the bundled model's training split, to calibrate on."""
    return _MODEL_DIR / "calibration.txt"


def evaluation_text() -> Path:
    """Returns a text file from the held-out split, which the bundled model never trained on."""
    return _MODEL_DIR / "evaluation.txt"
