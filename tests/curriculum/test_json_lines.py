from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from curriculum.json_lines import JsonLines, Record
from item_index.input_error import InputError


def written(path: Path, *lines: str, compress: bool = False) -> Path:
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return path


def record(**values: Any) -> Record:
    return Record(Path("file.json"), 7, values)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "gzipped-all-the-same.json"])
def test_lines_are_read_gzipped_or_not(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, '{"a": "\\u00e9\\u2028"}', '{"a": "x\u2028y"}', compress="gz" in name)
    lines = JsonLines(path)
    for _ in range(2):  # from the start each time
        assert [(read.line, read.values) for read in lines] == [(1, {"a": "é\u2028"}), (2, {"a": "x\u2028y"})]


def test_python_literals_are_parsed_where_they_are_wanted_and_never_run(tmp_path: Path) -> None:
    path = written(tmp_path / "meta.json", "{'a': u'it\\'s', 'b': [['x'], None]}", '{"a": true}')
    assert [read.values for read in JsonLines(path, python_literals=True)] == [
        {"a": "it's", "b": [["x"], None]}, {"a": True},
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"meta\.json, line 1: the line is not a JSON object \("):
        list(JsonLines(path))
    mark = tmp_path / "mark"
    hostile = written(tmp_path / "hostile.json", f"{{'a': open({str(mark)!r}, 'w')}}")
    with pytest.raises(InputError, match="line 1: the line is not a JSON object or a Python dict literal"):
        list(JsonLines(hostile, python_literals=True))
    assert not mark.exists()


@pytest.mark.parametrize("literals", [False, True])
@pytest.mark.parametrize("broken", ["", "{", "[1]", "3", '{"a": 1} x', "[" * 100_000, '{"a": "\udcff"}', "a\0b"])
def test_a_broken_line_is_named(tmp_path: Path, broken: str, literals: bool) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": 1}\n' + broken.encode("utf-8", "surrogateescape") + b'\n{"a": 2}\n')
    with pytest.raises(InputError, match="not a JSON object") as caught:
        list(JsonLines(path, python_literals=literals))
    assert (caught.value.file, caught.value.line) == (str(path), 2)


def test_a_truncated_file_is_an_error_at_its_line(tmp_path: Path) -> None:
    numbers = random.Random(0).sample(range(10**9), 20_000)
    content = gzip.compress("".join(f"{json.dumps({'a': number})}\n" for number in numbers).encode())
    path = tmp_path / "a.json.gz"
    path.write_bytes(content[: len(content) // 2])
    read = 0
    with pytest.raises(InputError, match="ends in the middle") as caught:  # noqa: PT012
        for record in JsonLines(path):
            assert record.values == {"a": numbers[read]}
            read += 1
    assert caught.value.line == read + 1
    assert 5_000 < read < 15_000


def test_damage_inside_the_compression_is_an_error_at_its_line(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b'{"a": 1}\n' * 10))
    content[-6] ^= 255  # of the check sum
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json\.gz, line \d+: the file cannot be read on"):
        list(JsonLines(path))


def test_files_that_are_not_there_or_not_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: the file does not exist"):
        JsonLines(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot be opened"):
        JsonLines(tmp_path)
    with pytest.raises(InputError, match=r"named \.gz but not gzipped"):
        JsonLines(written(tmp_path / "a.json.gz", "{}"))
    for empty in (written(tmp_path / "b.json"), written(tmp_path / "b.json.gz", compress=True)):
        with pytest.raises(InputError, match="the file has no lines"):
            list(JsonLines(empty))


def test_fields_of_the_right_type() -> None:
    read = record(id="B 1", time=-3, stars=4, share=0.5, text="a", lists=[["a", None], [["b"]], "c"], none=None)
    assert (read.identifier("id"), read.integer("time")) == ("B 1", -3)
    assert (read.number("stars"), read.number("share")) == (4.0, 0.5)
    assert [read.texts(field) for field in ("text", "lists", "none", "missing")] == [["a"], ["a", "b", "c"], [], []]
    assert record(text="half \ud83d").texts("text") == ["half \ufffd"]


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("identifier", 3), ("identifier", ""), ("identifier", " "), ("identifier", None), ("identifier", "a\ud83d"),
        ("identifier", "a\n"), ("integer", "3"), ("integer", 3.0), ("integer", True), ("integer", None),
        ("integer", 1 << 63), ("number", "3"), ("number", True), ("number", float("nan")), ("number", None),
        ("texts", 3), ("texts", ["a", 3]), ("texts", {"a": "b"}),
    ],
)  # fmt: skip
def test_fields_of_a_wrong_type_are_named(method: str, value: object) -> None:
    with pytest.raises(InputError, match=r"^file\.json, line 7, field 'x': .* is not "):
        getattr(record(x=value), method)("x")


@pytest.mark.parametrize("method", ["identifier", "integer", "number"])
def test_a_missing_field_is_named_with_those_that_are_there(method: str) -> None:
    with pytest.raises(InputError, match=r"field 'x': the field is missing; the line has y, z"):
        getattr(record(y=1, z=2), method)("x")
