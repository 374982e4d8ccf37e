"""Test conversations from files to tokens: the right ones, or a warning or refusal that says what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.calibration.conversations import UnusableError, as_messages, as_tools
from llm_quantize.errors import InputError
from texts import (
    BOS,
    EOS,
    FIRST,
    TEMPLATE,
    load,
    make_tokenizer,
    words,
    write_csv,
    write_lines,
    write_parquet,
)

# Takes content as parts alone, as the templates of some multimodal models do.
PARTS_TEMPLATE = (
    "{% for m in messages %}{{ 'w900' if m.role == 'user' else 'w901' }} {% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}<eos>"
)
# Takes both forms.
BOTH_TEMPLATE = (
    "{% for m in messages %}{{ 'w900' if m.role == 'user' else 'w901' }} {% if m.content is string %}{{ m.content }} "
    "{% else %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}<eos>"
)
TOOLS_TEMPLATE = (
    "{% for tool in tools or [] %}w800 {{ tool.name }} {{ tool.keys() | list | length }} {% endfor %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}<eos>"
)
TURNS = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
EXPECTED = [900 + FIRST, 1 + FIRST, 2 + FIRST, 901 + FIRST, 3 + FIRST, EOS]


def part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


WRITERS: dict[str, Callable[[Path, str, list[Any]], Path]] = {
    "jsonl": lambda d, column, values: write_lines(d / "a.jsonl", [{"id": 1, column: v} for v in values]),
    "parquet": lambda d, column, values: write_parquet(
        d / "a.parquet", {"id": [1] * len(values), column: values}
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("template", [TEMPLATE, PARTS_TEMPLATE, BOTH_TEMPLATE], ids=["text", "parts", "both"])
@pytest.mark.parametrize(
    "first",
    [
        "w1 w2",
        [part("w1 w2")],
        [part("w1"), part("w2")],
        [part("w1", "input_text"), part("w2")],
        part("w1 w2"),
    ],
    ids=["text", "part", "parts", "input_text", "one dict"],
)
def test_content_of_either_form_fits_templates_of_either(
    kind: str, template: str, first: Any, tmp_path: Path
) -> None:
    last: Any = "w3" if isinstance(first, str) else part("w3") if isinstance(first, dict) else [part("w3")]
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": last}]
    data = WRITERS[kind](tmp_path, "messages", [turns] * 2)
    windows, log = load(data, make_tokenizer(template=template), samples=2, seq_len=6)
    assert windows.tokens.tolist() == [EXPECTED] * 2
    assert log == []


@pytest.mark.parametrize("column", ["messages", "conversations", "chat", "text"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_messages_as_a_json_string(kind: str, column: str, tmp_path: Path) -> None:
    shared = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    values = [json.dumps(TURNS), " " + json.dumps(shared, indent=1)]
    if kind == "csv":
        data = write_csv(tmp_path / "a.csv", values)
        data.write_text(data.read_text().replace("id,text", f"id,{column}", 1))
    else:
        data = WRITERS[kind](tmp_path, column, values)
    windows, log = load(data, make_tokenizer(template=TEMPLATE), samples=2, seq_len=6, column=column)
    assert windows.tokens.tolist() == [EXPECTED] * 2
    assert log == []


def test_a_document_that_is_a_conversation_by_its_nature_stays_text(tmp_path: Path) -> None:
    """Among texts of a column of texts, JSON is text."""
    values = [words(0, 20), '[ {"role": "user", "content": "w1"} ]', words(20, 40)]
    windows, log = load(
        write_lines(tmp_path / "a.jsonl", [{"text": v} for v in values]), make_tokenizer(template=TEMPLATE)
    )
    assert windows.documents == 3
    assert 900 + FIRST not in windows.tokens
    assert log == []


def test_json_that_is_no_conversation_is_left_out_of_a_column_of_them(tmp_path: Path) -> None:
    values = [json.dumps(TURNS), json.dumps(TURNS)[:-9], '{"a": 1}', json.dumps(TURNS)]
    data = write_lines(tmp_path / "a.jsonl", [{"messages": v} for v in values])
    windows, log = load(data, make_tokenizer(template=TEMPLATE), samples=2, seq_len=6)
    assert windows.tokens.tolist() == [EXPECTED] * 2
    assert log == [
        f"calibration: {data}, column messages: 2 conversations are left out: it is text that begins as JSON, but no "
        "conversation"
    ]


@pytest.mark.parametrize("value", [str(TURNS), str(TURNS[0]), "[" + "\n ".join(map(str, TURNS)) + "]"])
def test_conversations_as_python_prints_them_are_refused(value: str, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "a.csv", [value] * 4)
    with pytest.raises(InputError, match=r"conversations as Python prints them, .*: write them as JSON"):
        load(data, make_tokenizer(template=TEMPLATE))


SCHEMA = {"name": "w7", "parameters": {"x": 1}}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("tools", "count"),
    [
        ([SCHEMA], 1),
        (json.dumps([SCHEMA]), 1),
        (json.dumps(SCHEMA), 1),
        ([json.dumps(SCHEMA)] * 2, 2),
        (None, 0),
        ("", 0),
        ("[]", 0),
    ],
)
def test_the_tools_of_a_row_reach_the_template(kind: str, tools: Any, count: int, tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "tools": tools}, {"messages": TURNS, "tools": tools}]
    if kind == "jsonl":
        data = write_lines(tmp_path / "a.jsonl", rows)
    else:
        data = write_parquet(tmp_path / "a.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    expected = [w + FIRST for w in [800, 7] * count]
    windows, log = load(data, make_tokenizer(template=TOOLS_TEMPLATE), samples=2, seq_len=4 + 3 * count)
    for window in windows.tokens.tolist():
        # The number of a schema's keys is no word of the vocabulary.
        assert [token for token in window if token >= FIRST or token == EOS] == [
            *expected, 1 + FIRST, 2 + FIRST, 3 + FIRST, EOS
        ]  # fmt: skip
    assert log == []


def test_tools_that_are_none_leave_the_conversation_out(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "tools": tools} for tools in ("search", None, [3], {"a": 1}, 7)]
    data = write_lines(tmp_path / "a.jsonl", rows)
    windows, log = load(data, make_tokenizer(template=TOOLS_TEMPLATE), samples=2, seq_len=4)
    assert windows.documents == 2
    assert [line for line in log if "left out" in line] == [
        f"calibration: {data}, column messages: 3 conversations are left out: its tools are no list of JSON schemas"
    ]


def test_arguments_of_calls_are_objects_for_the_template(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "w1", "arguments": '{"x": "w2"}'}}
    template = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments.x }} "
        "{% endfor %}{% endfor %}<eos>"
    )
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}] * 2
    windows, log = load(
        write_lines(tmp_path / "a.jsonl", rows), make_tokenizer(template=template), samples=2, seq_len=3
    )
    assert windows.tokens.tolist() == [[1 + FIRST, 2 + FIRST, EOS]] * 2
    assert log == []


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {"role": "user", "content": [{"type": "image", "url": "a"}]},
            "a message has a part that is not text: image",
        ),
        (
            {"role": "user", "content": [part("w1"), {"type": "audio"}]},
            "a message has a part that is not text: audio",
        ),
        ({"role": "user", "content": [3]}, "a message has a part that is not text: int"),
        ({"role": "user", "content": [{"type": []}]}, "a message has a part that is not text: dict"),
        ({"role": "user", "content": {"parts": ["w1"]}}, "a message has a part that is not text: dict"),
        ({"role": "user", "content": 3}, "a message's content is int, not text"),
        ({"role": "user", "text": "w1"}, "a message of role user has no content"),
        ({"from": "human", "text": "w1"}, "a message of role user has no content"),
        ({"role": "assistant", "content": None}, "a message of role assistant has no content"),
    ],
)
def test_content_that_is_not_text_is_left_out(message: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    data = write_lines(tmp_path / "a.jsonl", [{"messages": [message]}] + [{"messages": TURNS}] * 2)
    windows, log = load(data, tokenizer, samples=2, seq_len=6)
    assert windows.tokens.tolist() == [EXPECTED] * 2
    assert log == [f"calibration: {data}, column messages: 1 conversations are left out: {reason}"]
    write_lines(data, [{"messages": [message]}] * 3)
    with pytest.raises(InputError, match=r"no conversation of .* can be used: a message"):
        load(data, tokenizer)


# --- which column


@pytest.mark.parametrize("empty", [None, "", " \n", "absent"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_column_that_is_empty_is_not_taken_for_its_name(kind: str, empty: Any, tmp_path: Path) -> None:
    value: Any = json.dumps(TURNS) if kind == "csv" else TURNS
    rows = [{"messages": value} if empty == "absent" else {"text": empty, "messages": value}] * 2
    if kind == "jsonl":
        data = write_lines(tmp_path / "a.jsonl", rows)
    elif kind == "parquet":
        data = write_parquet(tmp_path / "a.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    else:
        data = write_csv(tmp_path / "a.csv", [value] * 2)
        lines = data.read_text().replace("id,text", "text,messages", 1).splitlines()
        data.write_text("\n".join([lines[0], *(f"{empty or ''}{line[1:]}" for line in lines[1:])]) + "\n")
        if empty in (" \n", "absent"):
            return  # not a CSV file of that kind
    windows, log = load(data, make_tokenizer(template=TEMPLATE), samples=2, seq_len=6)
    assert windows.tokens.tolist() == [EXPECTED] * 2
    assert log == []


def test_text_comes_first_where_both_columns_are_filled(tmp_path: Path) -> None:
    rows = [{"text": "w5 w6", "messages": TURNS}] * 3
    windows, log = load(write_lines(tmp_path / "a.jsonl", rows), make_tokenizer(template=TEMPLATE), seq_len=9)
    assert windows.tokens.tolist() == [[5 + FIRST, 6 + FIRST, EOS] * 3]
    assert len(log) == 1


@pytest.mark.parametrize(("texts", "turns", "chosen"), [(6, 2, "text"), (1, 7, "messages"), (4, 4, "text")])
def test_rows_of_another_column_are_told(texts: int, turns: int, chosen: str, tmp_path: Path) -> None:
    rows = [{"text": words(0, 9)}] * texts + [{"messages": TURNS}] * turns
    data = write_lines(tmp_path / "a.jsonl", rows)
    windows, log = load(data, make_tokenizer(template=TEMPLATE), samples=1)
    assert windows.source == f"{data}, column {chosen}"
    lost, other = (turns, "messages") if chosen == "text" else (texts, "text")
    assert log[0] == (
        f"calibration: {data}: {lost} of the first 8 rows have their text in column {other}, not {chosen}, and are "
        "left out: choose with --calib_column"
    )


def test_a_first_row_without_the_column(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    for first in ({"source": "w9"}, {}, {"id": 1}, {"source": "w9", "text": None}):
        data = write_lines(tmp_path / "a.jsonl", [first, {"text": words(0, 8)}, {"text": words(0, 8)}])
        windows, log = load(data, tokenizer, samples=2, seq_len=9)
        assert windows.documents == 2
        assert 9 + FIRST not in windows.tokens
        assert log == []


def test_rows_without_a_value_are_told(tmp_path: Path) -> None:
    rows = [{"text": words(0, 8)}] * 2 + [{"body": words(8, 16)}] * 3
    windows, log = load(write_lines(tmp_path / "a.jsonl", rows), make_tokenizer(), samples=2, seq_len=9)
    assert windows.documents == 2
    assert [line.rpartition(": ")[2] for line in log] == ["3 of 5 rows have no value there"]


def test_single_messages_are_no_documents(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", TURNS * 4)
    tokenizer = make_tokenizer(template=TEMPLATE)
    with pytest.raises(InputError, match=r"single messages \(role, content\): give a conversation a row"):
        load(data, tokenizer)
    assert load(data, tokenizer, column="content")[0].documents == 8  # as asked for
    (tmp_path / "b.jsonl").write_text(json.dumps(TURNS))
    with pytest.raises(InputError, match="single messages"):
        load(tmp_path / "b.jsonl", tokenizer)


def test_a_name_that_two_columns_have(tmp_path: Path) -> None:
    data = tmp_path / "a.csv"
    data.write_text("text,id,text\nw1,1,w2\n")
    with pytest.raises(InputError, match="has 2 columns 'text': rename all but one"):
        load(data, make_tokenizer())


# --- BOS


@pytest.mark.parametrize("before", ["<bos>", "<bos><bos>", "<bos> "])
@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_text_that_begins_with_bos_gets_no_second_one(kind: str, before: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True, template=before + TEMPLATE)
    row = {"text": f"{before}w1 w2 w3<eos>"} if kind == "text" else {"messages": TURNS}
    windows, _ = load(write_lines(tmp_path / "a.jsonl", [row] * 2), tokenizer, samples=1, seq_len=9)
    text = [1 + FIRST, 2 + FIRST, 3 + FIRST, EOS] if kind == "text" else EXPECTED
    assert windows.tokens.tolist() == [[BOS, *(text * 2)[:8]]]


def test_bos_inside_a_text_stays(tmp_path: Path) -> None:
    """A tokenizer that adds none, and text that has one elsewhere, are taken as they are."""
    data = write_lines(tmp_path / "a.jsonl", [{"text": "w1<bos>w2"}] * 2)
    windows, _ = load(data, make_tokenizer(bos=True), samples=1, seq_len=5)
    assert windows.tokens.tolist() == [[BOS, 1 + FIRST, BOS, 2 + FIRST, EOS]]


def test_conversations_that_are_all_refused_end_the_run_early(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template="{{ raise_exception('no') }}")
    data = write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}] * 3000)
    with pytest.raises(InputError, match=r"refuses 1000 conversations of .*, and none is good: no"):
        load(data, tokenizer, samples=400, seq_len=100)


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"role": ["user"], "content": ["a", "b"]}, None),  # lists of several lengths
        ([], None),
        ([{"Role": "user", "content": "a"}], None),
        ([{"role": "User", "content": "a"}], [{"role": "user", "content": "a"}]),
        ([{"role": 3, "content": "a"}], None),
        ([{"from": "human", "value": ""}], [{"role": "user", "content": ""}]),
        (
            [{"role": "assistant", "content": "a", "tool_calls": [{"id": None, "x": {"y": None, "z": 1}}]}],
            [{"role": "assistant", "content": "a", "tool_calls": [{"x": {"z": 1}}]}],
        ),
    ],
)
def test_messages_of_odd_forms(value: Any, messages: Any) -> None:
    assert as_messages(value) == messages


def test_tools_of_odd_forms() -> None:
    assert as_tools([]) is None
    assert as_tools({"name": ["a", "b"]}) == [{"name": "a"}, {"name": "b"}]
    odd: list[Any] = ["{", 3, [[]], ["x"], {"a"}]
    for value in odd:
        with pytest.raises(UnusableError):
            as_tools(value)
