"""Data as people have it, through every verb: the field that is asked for, and how windows begin."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, tiny, words
from tokenizers import processors
from torch import Tensor
from typer.testing import CliRunner

import llmkern
from llmkern.calibrate import load_tokens, load_windows
from llmkern.cli import build_app
from llmkern.distill import make_student
from llmkern.pipeline import Distill, Pipeline, Prune, Quantize
from llmkern.pipeline.compare import compare
from llmkern.pipeline.preflight import check

BOS, EOS = 0, 1
SEQ_LEN, SAMPLES = 16, 4
# What a tokenizer puts around every text, and what is to stand at the beginning of every window.
AROUND = {
    "llama": ("<s> $A", [BOS]),
    "qwen2": ("$A", []),
    "t5": ("$A </s>", []),
    "bert": ("<s> $A </s>", [BOS]),
    "opt": ("</s> $A", [EOS]),
    "glm": ("<pad> <s> $A", [2, BOS]),
}
TEMPLATES = {
    "begins": "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}",
    "each_turn": "{% for m in messages %}{{ bos_token }} {{ m.content }} </s>{% endfor %}",
    "plain": "{% for m in messages %} {{ m.content }}{% endfor %}",
}


def tokenizer(around: str = "llama", template: str | None = None) -> Any:
    made = words(template=template)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=AROUND[around][0], special_tokens=[("<s>", BOS), ("</s>", EOS), ("<pad>", 2)]
    )
    return made


def prose(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(5, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    entries = [{"id": f"{i:08x}", "title": "red sun", "body": t} for i, t in enumerate(prose(60))]
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def check_begin(windows: Tensor, begin: list[int]) -> None:
    assert all(row[: len(begin)] == begin for row in windows.tolist())
    inside = windows[:, len(begin) :]
    assert not (inside == BOS).any(), "a begin token inside of a window"
    assert not (inside == EOS).any(), "an end token inside of a window"


@pytest.mark.parametrize("kind", ["text", "file", "rows", "texts", "ragged_tokens"])
@pytest.mark.parametrize("around", AROUND)
def test_every_window_begins_as_the_tokenizer_begins_texts(
    around: str, kind: str, rows: Path, tmp_path: Path
) -> None:
    made, begin, model = tokenizer(around), AROUND[around][1], tiny()
    texts = prose(60)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(texts))
    source: Any = {
        "text": "\n\n".join(texts),
        "file": text,
        "rows": rows,
        "texts": texts,
        "ragged_tokens": [made(t)["input_ids"] for t in texts],
    }[kind]
    every = load_tokens(source, model, made, seq_len=SEQ_LEN)
    check_begin(every, begin)
    bare = made("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    inside = every[:, len(begin) :].flatten().tolist()
    assert inside == bare[: len(inside)]
    assert len(bare) - len(inside) < SEQ_LEN
    for samples in (SAMPLES, 10_000):  # and more than there are
        chosen = load_windows(source, model, made, seq_len=SEQ_LEN, samples=samples)
        check_begin(chosen, begin)
        assert len(chosen) == min(samples, len(bare) - SEQ_LEN + len(begin) + 1)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("around", ["llama", "qwen2"])
def test_chats_have_one_begin_token_per_window(around: str, template: str) -> None:
    made = tokenizer(around, TEMPLATES[template])
    turns = [{"role": "one", "content": "red sun"}, {"role": "two", "content": "blue sea one"}]
    chats = [{"messages": turns}] * 40
    windows = load_tokens(chats, tiny(), made, seq_len=SEQ_LEN)
    # Where only the template puts it, windows begin with it likewise.
    begins = around == "llama" or template != "plain"
    assert bool((windows[:, 0] == BOS).all()) == begins
    assert not (windows[:, 1:] == BOS).any()


def test_end_tokens_that_the_text_holds_stay_where_they_are() -> None:
    text = " </s> ".join(prose(40))
    windows = load_tokens(text, tiny(), tokenizer("opt"), seq_len=SEQ_LEN)
    assert (windows[:, 0] == EOS).all()
    assert (windows[:, 1:] == EOS).any()  # its begin token is its end token, too


class Stubborn:
    """Puts its tokens around every text, whatever it is told."""

    bos_token, eos_token, bos_token_id, eos_token_id = "<s>", "</s>", BOS, EOS

    def __call__(self, text: str, **options: Any) -> Any:
        return tokenizer("bert")(text)


def test_tokens_that_cannot_be_turned_off_are_moved_too(rows: Path) -> None:
    for source in (rows, "\n\n".join(prose(60)), prose(60)):
        check_begin(load_tokens(source, tiny(), Stubborn(), seq_len=SEQ_LEN), [BOS])


def test_begin_tokens_in_the_text_go(rows: Path) -> None:
    text = " <s> ".join(prose(40))
    check_begin(load_tokens(text, tiny(), tokenizer(), seq_len=SEQ_LEN), [BOS])
    windows = load_tokens(text, tiny(), tokenizer("qwen2"), seq_len=SEQ_LEN)
    assert (windows == BOS).any()  # of a tokenizer that puts none, they are text like any other


def test_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(
        ValueError, match="seq_len: got 2, expected more than the 2 tokens that the"
    ):
        load_tokens(" ".join(prose(9)), tiny(), tokenizer("glm"), seq_len=2)


def test_tokens_are_left_as_they_are() -> None:
    tokens = torch.randint(0, 96, (8, SEQ_LEN))
    for source in (tokens, tokens.tolist(), {"input_ids": tokens}):
        assert torch.equal(load_tokens(source, tiny(), tokenizer()), tokens)
    assert torch.equal(load_tokens(tokens.flatten(), tiny(), tokenizer(), seq_len=SEQ_LEN), tokens)


def quantized(model: Any, data: Any, **options: Any) -> Any:
    options |= {"samples": SAMPLES, "seq_len": SEQ_LEN}
    return llmkern.quantize(model, "gptq", calibration=data, **options)


def pruned(model: Any, data: Any, **options: Any) -> Any:
    options |= {"samples": SAMPLES, "seq_len": SEQ_LEN}
    return llmkern.prune(model, "wanda", sparsity=0.5, calibration=data, **options)


def narrowed(model: Any, data: Any, **options: Any) -> Any:
    options |= {"samples": SAMPLES, "seq_len": SEQ_LEN, "importance": "obs"}
    return llmkern.prune(model, "glu", ratio=0.5, round_to=8, calibration=data, **options)


def distilled(model: Any, data: Any, **options: Any) -> Any:
    options |= {"samples": SAMPLES, "seq_len": SEQ_LEN, "steps": 2, "batch_size": 2, "lr": 1e-2}
    return llmkern.distill(model, tiny(seed=9), data=data, **options)


@pytest.mark.parametrize("verb", [quantized, pruned, narrowed, distilled])
def test_a_verb_on_rows_does_what_it_does_on_their_windows(
    verb: Callable[..., Any], rows: Path
) -> None:
    made = tokenizer()
    both = [tiny(seed=1), tiny(seed=1)]
    said = verb(both[0], rows, tokenizer=made, text_field="body").notes
    windows = load_windows(rows, both[1], made, samples=SAMPLES, seq_len=SEQ_LEN, text_field="body")
    check_begin(windows, [BOS])
    verb(both[1], windows)
    states = [model.state_dict() for model in both]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(line.endswith("rows.jsonl: column body is read") for line in said)


def test_perplexity_is_of_windows_that_begin(rows: Path) -> None:
    model, made = tiny(seed=1, std=0.5), tokenizer()
    text = "\n\n".join(prose(60))
    bare = torch.tensor(made(text, add_special_tokens=False)["input_ids"])
    inner = SEQ_LEN - 1
    pieces = bare[: len(bare) // inner * inner].view(-1, inner)
    windows = torch.cat([torch.full((len(pieces), 1), BOS), pieces], 1)
    found = [
        llmkern.evaluate(model, source, made, seq_len=SEQ_LEN, speed=False)
        for source in (text, rows, windows)
    ]
    assert found[0] == found[1] == found[2]


def test_student_is_made_by_the_field(rows: Path) -> None:
    made = tokenizer()
    options = {"samples": SAMPLES, "seq_len": SEQ_LEN, "round_to": 8}
    student = make_student(
        tiny(seed=1), width=0.5, calibration=rows, tokenizer=made, text_field="body", **options
    )
    assert student.config.intermediate_size == 64


def test_pipeline_takes_the_field_of_its_data_and_of_a_stages_own(
    rows: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("story,remark\n" + "\n".join(f"{t},red sun" for t in prose(60, seed=1)))
    common: dict[str, Any] = {"samples": SAMPLES, "seq_len": SEQ_LEN}
    stages = [
        Prune("wanda", sparsity=0.5, **common),
        Quantize("gptq", calibration=str(other), text_field="story", **common),
        Distill(student={"layers": 0.5, "width": 0.5}, steps=1, batch_size=2, **common),
    ]
    options: dict[str, Any] = {"calibration": rows, "tokenizer": tokenizer(), "text_field": "body"}
    found = check(tiny(), stages, **options)
    assert not found.errors
    notes = [str(note) for note in found.notes if "column" in str(note)]
    assert [note.partition(": column ")[2].split()[0] for note in notes] == [
        "body",
        "story",
        "body",
    ]
    text = tmp_path / "held_out.txt"
    text.write_text("\n\n".join(prose(80, seed=2)))
    report = Pipeline(stages).run(
        tiny(seed=1), tmp_path / "out", evaluation=text, speed=False, sensitivity=False, **options
    )
    said = [stage.driver["notes"] for stage in report.stages[1:]]
    assert [" ".join(notes).count("column") for notes in said] == [1, 1, 1]
    with pytest.raises(
        ValueError, match="text_field: got 'body', expected None: no data with fields"
    ):
        Pipeline(stages).preflight(tiny(), tmp_path, calibration=text, text_field="body")
    with pytest.raises(
        ValueError, match="calibration: got a generator, expected a list of its texts"
    ):
        Pipeline(stages).run(tiny(), tmp_path / "x", calibration=(t for t in prose(9)))


def test_directory_of_a_run_is_not_resumed_with_other_data(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(prose(60)))
    stage = Prune("wanda", sparsity=0.5, samples=SAMPLES, seq_len=SEQ_LEN)
    options: dict[str, Any] = {"tokenizer": tokenizer(), "evaluation": rows, "speed": False}
    run = Pipeline([stage]).run
    run(tiny(seed=1), tmp_path / "out", calibration=folder, **options)
    run(tiny(seed=1), tmp_path / "out", calibration=folder, resume=True, **options)
    (folder / "a.txt").write_text("\n\n".join(prose(60, seed=1)))
    with pytest.raises(ValueError, match="calibration"):
        run(tiny(seed=1), tmp_path / "out", calibration=folder, resume=True, **options)


def test_compare_takes_the_field_where_there_is_one(rows: Path, tmp_path: Path) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("\n\n".join(prose(80, seed=2)))
    options: dict[str, Any] = {"samples": SAMPLES, "seq_len": SEQ_LEN, "windows": 4, "speed": False}
    said: list[str] = []
    report = compare(
        tiny(seed=1, hidden_size=128, intermediate_size=128),
        methods=["gptq 4-bit"],
        calibration=rows,
        evaluation=text,
        text_field="body",
        tokenizer=tokenizer(),
        said=said.append,
        **options,
    )
    assert len(report.stages) == 2
    assert said[0] == f"calibration: {rows}: column body is read"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    llmkern.save(tiny(seed=1, max_position_embeddings=64), path, tokenizer())
    return path


SIZES = ("--samples", SAMPLES, "--seq-len", SEQ_LEN)
COMMANDS: dict[str, tuple[str, tuple[object, ...]]] = {
    "quantize": ("--calibration", ("-o", "out", "--group-size", 32, *SIZES)),
    "prune": ("--calibration", ("-o", "out", "--method", "wanda", "--sparsity", 0.5, *SIZES)),
    "distill": ("--data", ("-o", "out", "--steps", 1, "--batch-size", 2, *SIZES)),
    "eval": ("--text", ("--seq-len", SEQ_LEN)),
    "compress": ("--calibration", ("-o", "out", "--dry-run")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_read_and_take_the_field(
    command: str, model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    option, others = COMMANDS[command]

    def run(*more: object) -> Any:
        return CliRunner(env={"COLUMNS": "300"}).invoke(
            build_app(), list(map(str, (command, model_dir, option, rows, *others, *more)))
        )

    refused = run("--text-field", "nope")
    text = f"{refused.exception} {refused.output}"
    assert refused.exit_code == 1
    assert "text_field: got 'nope', expected one of id, title, body of" in text
    result = run()
    assert result.exit_code == 0, result.exception
    assert "rows.jsonl: column body is read" in result.output


def test_own_name_of_rows_wins_over_a_choice(
    model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["--text", rows, "--text-field", "title", "--seq-len", SEQ_LEN, "--json", "out.json"]
    result = CliRunner().invoke(build_app(), list(map(str, ["eval", model_dir, *names])))
    assert result.exit_code == 0, result.exception
    tokens = json.loads(Path("out.json").read_text())["protocol"]["tokens"]
    assert tokens == 60 * 2 // (SEQ_LEN - 1) * SEQ_LEN  # two words a row
