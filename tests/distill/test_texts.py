"""Files of prompts and answers: every form is read, every bad line is named."""

from __future__ import annotations

import gzip
import json

import pytest

from llmkern.distill._texts import Pair, read_pairs, read_prompts


def test_prompts_are_lines_of_text_or_of_json(tmp_path):
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\n\n  two\n")
    assert read_prompts(plain) == ["one", "  two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "c"}\n')
    assert read_prompts(str(lines)) == ["a\nb", "c"]
    assert read_prompts(("x", "y")) == ["x", "y"]


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        ({"prompt": "p", "answer": "a"}, Pair("p", "a")),
        ({"prompt": "p", "answer": "a", "finished": False}, Pair("p", "a", False)),
        ({"prompt": "p", "completion": " a"}, Pair("p", " a")),
        ({"instruction": "p", "output": "a", "input": ""}, Pair("p", "a")),
        ({"instruction": "p", "output": "a", "input": "i"}, Pair("p\ni", "a")),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
            Pair("p", "a"),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "p"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            Pair([{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "a"),
        ),
    ],
)
def test_every_form_of_a_pair_is_read(entry, want, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(entry) + "\n")
    assert read_pairs(path) == [want]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "got no JSON"),
        ("[1, 2]", "got list, expected a JSON object"),
        ('{"question": "p", "answer": "a"}', "got question, answer, expected prompt and answer"),
        ('{"prompt": "p", "answer": ""}', "answer: got '', expected a text"),
        ('{"prompt": 3, "answer": "a"}', "prompt: got 3, expected a text"),
        (
            '{"prompt": "p", "answer": "a", "finished": 1}',
            "finished: got 1, expected true or false",
        ),
        ('{"messages": []}', "messages: got"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "p"}]}',
            "messages: got .* the last of them the assistant's",
        ),
    ],
)
def test_bad_lines_are_named_by_number(line, message, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "p", "answer": "a"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"pairs.jsonl, line 3: .*{message}"):
        read_pairs(path)


ROWS = [{"prompt": "a, b\nc", "answer": "d"}, {"prompt": "e", "answer": "f"}]
CSV = 'prompt,answer\n"a, b\nc",d\ne,f\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps({"data": ROWS}).encode()),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS)).encode()),
        ("marked.jsonl", b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode()),
        ("a.jsonl.gz", gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
        ("a.csv", CSV.encode()),
        ("a.tsv", CSV.replace("prompt,answer", "prompt\tanswer").replace('c",', 'c"\t').encode()),
    ],
)
def test_prompts_and_pairs_come_from_every_file_of_rows(name, content, tmp_path):
    path = tmp_path / name
    if name.endswith(".tsv"):
        content = content.replace(b"e,f", b"e\tf")
    path.write_bytes(content)
    assert read_prompts(path) == ["a, b\nc", "e"]
    assert read_pairs(path) == [Pair("a, b\nc", "d"), Pair("e", "f")]


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        (
            {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
            Pair("p", "a"),
        ),
        ({"prompt": "p", "response": "a"}, Pair("p", "a")),
        ({"instruction": "p", "context": "c", "response": "a"}, Pair("p\nc", "a")),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            Pair("p", "a"),
        ),
    ],
)
def test_other_names_of_pairs_are_known(entry, want, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(entry) + "\n")
    assert read_pairs(path) == [want]


def test_lines_of_prompts_end_where_lines_end(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\x0cb\u2028c\r\nd\r\n".encode())
    assert read_prompts(path) == ["a\x0cb\u2028c", "d"]
    path.write_bytes("café".encode("latin1"))
    with pytest.raises(ValueError, match=r"prompts: got .*expected UTF-8 text"):
        read_prompts(path)


def test_files_without_anything_are_refused(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match=r"answers: got no answer in .*empty.jsonl, expected some"):
        read_pairs(empty)
    with pytest.raises(ValueError, match=r"prompts: got no prompt in .*empty.jsonl, expected some"):
        read_prompts(empty)
    with pytest.raises(ValueError, match=r"prompts: got 'no.txt', expected an existing file"):
        read_prompts("no.txt")
    with pytest.raises(ValueError, match="prompts: got ' ' as number 1, expected a text"):
        read_prompts(("a", " "))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompts: got .*binary.txt, expected UTF-8 text"):
        read_prompts(binary)
