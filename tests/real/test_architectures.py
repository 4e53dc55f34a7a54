"""Architecture by verb: what works and what is refused, as `docs/models.md` tells users.

    pytest tests/real/test_architectures.py --update-models && python scripts/update_tables.py

writes outcomes.json and from it the document. A cell that neither works nor is refused in one line at the
start fails, and has no entry there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import verbs
from architectures import ARCHITECTURES
from verbs import Subject, run_verb

OUTCOMES = Path(__file__).parent / "outcomes.json"
PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes")
HERE = [
    verb
    for verb in verbs.VERBS
    if verb not in verbs.NEEDS or importlib.util.find_spec(verbs.NEEDS[verb]) is not None
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def recorded() -> dict[str, Any]:
    return json.loads(OUTCOMES.read_text()) if OUTCOMES.is_file() else {}


def record(name: str, row: dict[str, str]) -> None:
    """Write a row, without the cells that fail."""
    if "PYTEST_XDIST_WORKER" in os.environ or list(verbs.VERBS) != HERE:
        pytest.fail("--update-models needs one process and all packages of the table")
    rows = recorded().get("outcomes", {})
    rows[name] = {verb: outcome for verb, outcome in row.items() if not _fails(outcome)}
    made = {
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "verbs": list(verbs.VERBS),
        "outcomes": {name: rows[name] for name in ARCHITECTURES if name in rows},
    }
    OUTCOMES.write_text(json.dumps(made, indent=1) + "\n")


def _fails(outcome: str) -> bool:
    return outcome.startswith("FAILS")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_verb_works_or_is_refused(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    architecture = ARCHITECTURES[name]
    if not hasattr(transformers, architecture.model_class):
        pytest.skip(f"transformers {transformers.__version__} lacks {architecture.model_class}")
    subject = Subject(architecture, tmp_path)
    row = subject.outcomes
    for verb in HERE:
        row[verb] = run_verb(subject, verb)
    if request.config.getoption("--update-models"):
        record(name, row)
    wanted = recorded().get("outcomes", {}).get(name, {})
    wrong = [
        f"{verb}: {outcome}" + ("" if _fails(outcome) else f"; outcomes.json: {wanted.get(verb)}")
        for verb, outcome in row.items()
        if _fails(outcome) or outcome != wanted.get(verb)
    ]
    assert not wrong, "\n".join([f"{name}: {len(wrong)} of {len(row)} cells", *wrong])


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.takes == "text"])
def test_every_weight_of_the_text_tells_in_the_logits(name: str) -> None:
    model = ARCHITECTURES[name].model()
    model(**ARCHITECTURES[name].inputs(torch.float32)).logits.square().mean().backward()
    silent = [
        parameter
        for parameter, value in model.named_parameters()
        if value.grad is None or not bool(value.grad.any())
    ]
    # Pictures are not given, and without them Mllama leaves out the blocks that look at them.
    pictures = ("vision", "visual", "projector")
    skipped = ("layers.1.", "layers.3.") if name == "Mllama" else ()
    assert not [p for p in silent if not any(part in p for part in (*pictures, *skipped))]


def test_the_recorded_table_is_whole() -> None:
    assert list(recorded()["outcomes"]) == list(ARCHITECTURES)
    assert recorded()["verbs"] == list(verbs.VERBS)
