"""Test text files of other encodings, delimiters and forms of JSON: all of their text, or a refusal."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.calibration import json_files, text_sources
from llm_quantize.calibration.text_files import encoding_of
from llm_quantize.errors import InputError
from texts import load, make_tokenizer, numbers, words, write_lines

# Texts of many scripts: what UTF-16 looks like depends on it.
TEXTS = {
    "English": "The quick brown fox, 42 times.\nAnd more.\n",
    "German": "Füße über Straßen; größer als Äpfel.\r\nÖl.\r\n",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.\n",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.\n",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم\n",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고\n",
    "emoji": "words and 😀 and more 🎉\n",
}


def read_all(path: Path, column: str = "text") -> list[Any]:
    with text_sources.reading(path):
        return list(text_sources.open_table(path, seed=0).read(column))


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- encodings


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
@pytest.mark.parametrize("language", TEXTS)
def test_encodings_of_unicode_are_told(language: str, encoding: str, packed: bool, tmp_path: Path) -> None:
    text = TEXTS[language] * 2000
    data = text.encode(encoding)
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert "".join(read_all(path)) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE], ids=["UTF-16", "UTF-32"])
def test_marks_of_the_other_byte_order(mark: bytes, tmp_path: Path) -> None:
    encoding = "utf-16-be" if len(mark) == 2 else "utf-32-be"
    (tmp_path / "a.txt").write_bytes(mark + "some wörds".encode(encoding))
    assert read_all(tmp_path / "a.txt") == ["some wörds"]


def test_windows_of_utf_16_are_those_of_utf_8(tmp_path: Path) -> None:
    records = "".join(json.dumps({"text": words(i, i + 9)}) + "\n" for i in range(0, 900, 9))
    prints = set()
    for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
        for name, text in (("a.jsonl", records), ("a.json", f"[{','.join(records.splitlines())}]")):
            (tmp_path / name).write_bytes(text.encode(encoding))
            prints.add(load(tmp_path / name, make_tokenizer(), samples=20)[0].fingerprint)
        (tmp_path / "a.csv").write_bytes(
            ("id,text\n" + "".join(f"1,{words(i, i + 9)}\n" for i in range(0, 900, 9))).encode(encoding)
        )
        prints.add(load(tmp_path / "a.csv", make_tokenizer(), samples=20)[0].fingerprint)
    assert len(prints) == 1


def test_chinese_in_utf_16_is_never_taken_for_something_else(tmp_path: Path) -> None:
    """Few of its characters have a null, on either side: it is refused rather than guessed."""
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.txt").write_bytes(("我能吞下玻璃而不伤身体。一二三\n" * 3000).encode(encoding))
        assert "null characters" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "data",
    [
        b"words\0more words\0" * 50,  # a list of names
        b"some words " * 500 + b"\0",
        b"\0" * 4000,
        bytes(random.Random(0).randrange(256) for _ in range(4000)),
        b"\x7fELF\2\1\1" + b"\0" * 9 + b"\3\0\x3e\0\1\0\0\0" * 90,
        b"words " * 20_000 + b"\0 and more",  # after the part by which the encoding is told
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_what_is_no_text_is_refused(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((b'{"text": "a"}\n' if name == "a.jsonl" else b"text\n") + data)
    assert refused(tmp_path / name).startswith(f"cannot read {tmp_path / name}: ")


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    for encoding in ("latin-1", "gbk", "shift-jis", "cp1251"):
        text = {"latin-1": "Füße", "cp1251": "Съешь"}.get(encoding, "日本語")
        (tmp_path / "a.txt").write_bytes((text * 50).encode(encoding))
        assert "not UTF-8 text" in refused(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("some words".encode("utf-16")[:-1])
    assert "not UTF-16" in refused(tmp_path / "a.txt")


def test_utf_8_is_never_taken_for_utf_16() -> None:
    drawn = random.Random(0)
    for text in TEXTS.values():
        for _ in range(50):
            sample = "".join(drawn.choices(text, k=drawn.randrange(300))).encode()
            assert encoding_of(sample) == "utf-8-sig"
    assert encoding_of(b"") == "utf-8-sig"


# --- CSV

ROWS = [
    "some words",
    "with, a comma",
    "with; a semicolon",
    "a\ttab | and a bar",
    'a "quote"',
    "on two\nlines",
]


def csv_text(delimiter: str, end: str = "\n", header: str = "id{0}text{0}note") -> str:
    quoted = [row.replace('"', '""') for row in ROWS]
    return end.join(
        [header.format(delimiter), *(f'{i}{delimiter}"{r}"{delimiter}x' for i, r in enumerate(quoted)), ""]
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_are_told(delimiter: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(csv_text(delimiter, end), newline="")
    table = text_sources.open_table(tmp_path / "a.csv", seed=0)
    assert table.columns == ("id", "text", "note")
    assert list(table.read("text")) == ROWS


def test_a_delimiter_in_the_text_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\nwords, with; 1\nmore, and, more; 2\n")
    assert read_all(tmp_path / "a.csv") == ["words, with", "more, and, more"]
    (tmp_path / "a.csv").write_text("text,label\nwords; with, 1\nmore; and; more, 2\n")
    assert read_all(tmp_path / "a.csv") == ["words; with", "more; and; more"]
    # The comma of the header parts no other line.
    (tmp_path / "a.csv").write_text("text;of which, language\nwords;en\nmore;de\n")
    assert read_all(tmp_path / "a.csv") == ["words", "more"]


def test_delimiters_that_cannot_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;a|b\nwords;1|2\n")
    assert "may end in any of ';' '|': use commas" in refused(tmp_path / "a.csv")


@pytest.mark.parametrize("header", ["id,text", '"id","text"', "text", "\ufefftext"])
def test_a_header_that_is_repeated_is_no_row(header: str, tmp_path: Path) -> None:
    """Files that were joined."""
    row = "1,some words" if "id" in header else "some words"
    (tmp_path / "a.csv").write_text(f"{header}\n{row}\n{header}\n{row}\n\n{header}\n")
    assert read_all(tmp_path / "a.csv") == ["some words"] * 2


def test_more_fields_than_the_header_has(tmp_path: Path) -> None:
    """The text would be cut at its first comma."""
    (tmp_path / "a.csv").write_text("text\nsome words\nmore, and more\n")
    assert refused(tmp_path / "a.csv").endswith(
        "record 3 has 2 fields, and the header has 1: put quotes around text that holds a ','"
    )
    (tmp_path / "a.csv").write_text("id,text\n1,some words,,\n2\n\n3,more,\n")
    assert read_all(tmp_path / "a.csv") == ["some words", None, "more"]


# --- JSON

RECORDS: list[Any] = [{"text": row, "x": [1, {"y": None}]} for row in ROWS] + [
    {"text": 'ünï 😀 \\ "q" ' * 50}
]


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_one_list_in_a_file_of_either_name(
    name: str, indent: int | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "BLOCK", block)
    data = ("\n " + json.dumps(RECORDS, indent=indent, ensure_ascii=bool(indent)) + " \n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_all(tmp_path / name) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("block", [1, 5, 1 << 16])
@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"version": 1, "data": [{"text": "a"}, {"text": "b"}], "end": [1]}, ["a", "b"]),
        ({"none": [], "data": [{"text": "a"}], "deep": {"list": [{"text": "c"}]}}, ["a"]),
        ({"text": "a", "data": [{"text": "b"}]}, ["a"]),
        ({"messages": [{"role": "user", "content": "a"}], "text": "b"}, ["b"]),
        ([], None),
        (["a", "b"], ["a", "b"]),
        ("a", ["a"]),
    ],
)
def test_documents_of_json(
    document: Any, expected: list[str] | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "BLOCK", block)
    (tmp_path / "a.json").write_text(json.dumps(document, indent=1))
    if expected is None:
        assert text_sources.open_table(tmp_path / "a.json", seed=0).columns == ()
    else:
        assert read_all(tmp_path / "a.json") == expected


def test_records_one_after_another_in_a_json_file(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    (tmp_path / "a.json").write_text(text)
    assert read_all(tmp_path / "a.json") == [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1", "not JSON"),
        ('[{"text": "a"} {"text": "b"}]', "not JSON (Expecting ']' at character 15)"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "more follows its list"),
        ('{"text": "a"', "not JSON"),
        ('{"data": [{"text": "a"}, ]}', "not JSON (Expecting value at character 25)"),
        ("{1: 2}", "not JSON (Expecting property name enclosed in double quotes at character 1)"),
        ("[" * 5000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "Exceeds the limit"),
    ],
)
def test_json_that_is_not_sound(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert told in refused(tmp_path / "a.json")


def test_a_value_of_json_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LINE", 100_000)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 50_000}] * 20))
    assert len(read_all(tmp_path / "a.json")) == 20
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 900_000}]))
    assert "a value is longer than" in refused(tmp_path / "a.json")


def test_numbers_at_the_end_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "a.json"
    data.write_text(json.dumps([{"text": words(i, i + 8), "n": 123456} for i in range(0, 800, 8)]))
    expected = numbers(load(data, make_tokenizer(), samples=50)[0])
    for block in (1, 2, 3, 64):
        monkeypatch.setattr(json_files, "BLOCK", block)
        assert numbers(load(data, make_tokenizer(), samples=50)[0]) == expected
    lines = write_lines(tmp_path / "a.jsonl", json.loads(data.read_text()))
    assert numbers(load(lines, make_tokenizer(), samples=50)[0]) == expected


@pytest.mark.parametrize("document", ["[{}]", '{"a": [{}]}', '{"a": [{}], "data": [{"text": "a"}]}'])
def test_lists_of_next_to_nothing_are_not_all_read(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_files, "MANY", 1000)
    path = tmp_path / "a.json"
    for unit, count, fails in (('"a"', 900, False), ('"a"', 1100, True), ('{"text": "a"}', 1100, False)):
        path.write_text(document.replace("[{}]", f"[{', '.join([unit] * count)}]"))
        if fails:
            assert "more than 1,000 values of fewer than 10 characters" in refused(path)
        else:
            with contextlib.suppress(InputError):  # such as two lists, which are no document
                read_all(path)
            assert text_sources.open_table(path, seed=0).columns
