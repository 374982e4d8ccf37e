"""Test token windows from local text. Each word is one token, and its id tells its number."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.calibration import text_sources
from llm_quantize.calibration.conversations import as_messages
from llm_quantize.calibration.hub_datasets import HubData
from llm_quantize.calibration.sampling import Item, draw, split_text
from llm_quantize.calibration.table import Table
from llm_quantize.calibration.text_use import CALIBRATION, EVALUATION, HELD_OUT, TextUse
from llm_quantize.calibration.windows import (
    CalibrationConfig,
    check_source,
    check_window_length,
    load_windows,
    longest_window,
)
from llm_quantize.errors import InputError
from texts import (
    BOS,
    EOS,
    FIRST,
    LINE,
    TEMPLATE,
    UNKNOWN,
    load,
    make_tokenizer,
    numbers,
    save_dataset,
    words,
    write_csv,
    write_gz,
    write_json,
    write_lines,
    write_parquet,
    write_text,
)

ROWS = [f"w{start} w{start + 1} w{start + 2}" for start in range(0, 90, 3)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


SOURCES: dict[str, Callable[[Path], Path]] = {
    "txt": lambda d: write_text(d / "a.txt", "\n".join(ROWS)),
    "txt.gz": lambda d: write_gz(d / "a.txt.gz", "\n".join(ROWS)),
    "BOM": lambda d: write_text(d / "a.TXT", "\ufeff" + "\n".join(ROWS)),
    "jsonl": lambda d: write_lines(d / "a.jsonl", [{"text": row} for row in ROWS]),
    "jsonl.gz": lambda d: write_lines(d / "a.jsonl.gz", [{"text": row} for row in ROWS]),
    "jsonl of strings": lambda d: write_lines(d / "a.jsonl", ROWS),
    "json": lambda d: write_json(d / "a.json", [{"text": row} for row in ROWS]),
    "json of strings": lambda d: write_json(d / "a.json", ROWS),
    "json by lines": lambda d: write_lines(d / "a.json", [{"text": row} for row in ROWS]),
    "json object": lambda d: write_json(
        d / "a.json", {"version": 1, "data": [{"text": row} for row in ROWS]}
    ),
    "json.gz": lambda d: write_gz(d / "a.json.gz", json.dumps([{"text": row} for row in ROWS])),
    "csv": lambda d: write_csv(d / "a.csv", ROWS),
    "csv.gz": lambda d: write_csv(d / "a.csv.gz", ROWS),
    "parquet": lambda d: write_parquet(d / "a.parquet", {"id": list(range(30)), "text": ROWS}),
    "saved": lambda d: save_dataset(d / "saved", {"text": ROWS}),
    "saved dict": lambda d: save_dataset(d / "saved", {"text": ROWS}, "validation", "test"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_file_gives_all_its_text(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    windows, log = load(SOURCES[kind](tmp_path), tokenizer, samples=10)
    whole = "txt" in kind.lower() or kind == "BOM"
    # 90 words. Each row is a document, closed by EOS; a text file is one document, drawn in three pieces.
    assert windows.tokens_seen == (93 if whole else 120)
    assert windows.documents == (1 if whole else 30)
    assert windows.tokens.shape == (min(10, windows.tokens_seen // 8), 8)
    drawn = numbers(windows)
    assert len(set(drawn)) == len(drawn) >= 60
    assert UNKNOWN not in windows.tokens
    assert set(drawn) <= set(range(90))
    assert bool(log) == (len(windows.tokens) < 10)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (False, True, "w0 w1 w2 <eos> w3 w4 w5 <eos>"),
        (False, False, "w0 w1 w2 \n\n w3 w4 w5 \n\n"),
        (True, True, "<bos> w0 w1 w2 <eos> w3 w4 w5"),
        (True, False, "<bos> w0 w1 w2 \n\n w3 w4 w5"),
    ],
)
def test_documents_are_joined_and_blank_ones_are_skipped(
    bos: bool, eos: bool, expected: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    rows = ["", "w0 w1 w2", " \n ", None, "w3 w4 w5", "\n\n"]
    data = write_lines(tmp_path / "a.jsonl", [{"text": row} for row in rows])
    texts = [
        tokenizer.convert_ids_to_tokens(load(data, tokenizer, samples=1, seed=seed)[0].tokens[0].tolist())
        for seed in range(8)
    ]
    other = expected.replace("w0 w1 w2", "x").replace("w3 w4 w5", "w0 w1 w2").replace("x", "w3 w4 w5")
    assert {"".join(text) for text in texts} == {e.replace(" ", "") for e in (expected, other)}


def test_every_window_begins_with_bos_if_the_tokenizer_adds_it(tmp_path: Path) -> None:
    data = write_text(tmp_path / "a.txt", words(0, 200))
    tokens = load(data, make_tokenizer(bos=True))[0].tokens
    assert tokens[:, 0].tolist() == [BOS] * 4
    assert BOS not in tokens[:, 1:]


def test_a_long_document_is_sampled_evenly_and_without_repetition(tmp_path: Path, tokenizer: Any) -> None:
    data = write_text(tmp_path / "a.txt", "\n".join(words(i, i + 10) for i in range(0, 30_000, 10)))
    windows, log = load(data, tokenizer, samples=64, seq_len=16)
    drawn = numbers(windows)
    assert len(drawn) == len(set(drawn)) > 64 * 15
    assert log == []
    # Each tenth of the text gives some words.
    assert {n // 3000 for n in drawn} == set(range(10))
    # Most words of a window follow the word before them, as in the text.
    follows = sum(b - a == 1 for a, b in itertools.pairwise(drawn))
    assert follows > 0.9 * len(drawn)


def test_the_seed_decides(tmp_path: Path, tokenizer: Any) -> None:
    data = write_text(tmp_path / "a.txt", "\n".join(words(i, i + 10) for i in range(0, 30_000, 10)))
    prints = [load(data, tokenizer, seed=seed)[0].fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 64


def test_lines_of_articles_are_joined(tmp_path: Path, tokenizer: Any) -> None:
    rows = ["", " = w0 = \n", "", f" {words(1, 20)} \n", " = = w20 = = \n", "", f" {words(21, 40)} \n"]
    rows += ["", " = w40 = \n", "", f" {words(41, 80)} \n"]
    windows, _ = load(write_parquet(tmp_path / "a.parquet", {"text": rows}), tokenizer, samples=2, seq_len=40)
    assert windows.documents == 2
    kept = [token for token in windows.tokens.flatten().tolist() if token != LINE]
    # Two articles of 40 words, in either order; the last words are cut off.
    first, second = range(FIRST, FIRST + 40), range(FIRST + 40, FIRST + 80)
    assert len(kept) > 70
    assert kept in ([*a, EOS, *b][: len(kept)] for a, b in ((first, second), (second, first)))


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    shared = [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]
    expected = [900 + FIRST, 1 + FIRST, 2 + FIRST, 901 + FIRST, 3 + FIRST, EOS]
    for index, (column, conversation) in enumerate([("messages", turns), ("conversations", shared)]):
        for data in (
            write_lines(tmp_path / f"{index}.jsonl", [{"id": 1, column: conversation}] * 2),
            write_parquet(tmp_path / f"{index}.parquet", {"id": [1, 2], column: [conversation] * 2}),
        ):
            windows, _ = load(data, tokenizer, samples=2, seq_len=6)
            # The template ends a conversation with EOS itself: no second EOS follows.
            assert windows.tokens.tolist() == [expected] * 2
            assert f"column {column}" in windows.source


def test_conversations_that_the_template_refuses_are_reported(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    good = [{"role": "user", "content": words(0, 20)}]
    bad = [{"role": "tool", "content": "w1"}]
    mixed = write_lines(tmp_path / "mixed.jsonl", [{"messages": bad}, {"messages": good}])
    windows, log = load(mixed, tokenizer, samples=2)
    assert windows.documents == 1
    assert len(windows.tokens) == 2
    assert log == ["calibration: the chat template refuses 1 conversations: no tool"]
    with pytest.raises(InputError, match=r"refuses every conversation of .*: no tool"):
        load(write_lines(tmp_path / "bad.jsonl", [{"messages": bad}]), tokenizer)


def test_fewer_windows_than_asked_for_give_a_warning(tmp_path: Path, tokenizer: Any) -> None:
    windows, log = load(write_text(tmp_path / "a.txt", words(0, 20)), tokenizer, samples=100)
    assert windows.tokens.shape == (2, 8)
    assert windows.requested == 100
    assert log == [
        f"calibration: {tmp_path}/a.txt has only 21 tokens: 2 windows of 8 instead of the 100 asked for"
    ]
    assert str(windows) == f"2 x 8 = 16 tokens from 1 document of {tmp_path}/a.txt"


def test_tokens_of_any_length_fill_the_windows(tmp_path: Path, tokenizer: Any) -> None:
    # A token has a hundred characters, so that the first pool holds too few tokens.
    data = write_lines(
        tmp_path / "a.jsonl", [{"text": f"w{i}{' ' * 97} w{i + 1}"} for i in range(0, 2000, 2)]
    )
    windows, log = load(data, tokenizer, samples=64)
    assert windows.tokens.shape == (64, 8)
    assert log == []


def test_tokenizing_is_quiet(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.WARNING)
    load(save_dataset(tmp_path / "saved", {"text": [words(0, 200)]}), tokenizer)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def bad_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(words(0, 20_000).encode())[:-2000])
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# How to make the wrong input, options, and a pattern of the message.
REFUSALS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "missing file": (lambda d: d / "none.txt", {}, "no such file or directory: .*none.txt"),
    "missing relative file": (lambda d: "none.jsonl.gz", {}, "no such file or directory: none.jsonl.gz"),
    "missing directory": (lambda d: d / "none", {}, "no such file or directory"),
    "unknown extension": (
        lambda d: write_text(d / "a.docx", "w"),
        {},
        "cannot tell what .*a.docx is by its name",
    ),
    "compressed parquet": (lambda d: write_text(d / "a.parquet.gz", "w"), {}, "cannot tell what"),
    "not a saved dataset": (lambda d: d, {}, "holds no dataset written by save_to_disk"),
    "malformed id": (lambda d: "org/name:a:b:c:d", {}, "cannot read 'org/name:a:b:c:d' as calibration data"),
    "spaces": (lambda d: "my text", {}, r"give wikitext, c4, pileval, a hub id repo\[:config"),
    "no samples": (lambda d: write_text(d / "a.txt", "w"), {"samples": 0}, "--calib_samples 0: at least 1"),
    "no length": (lambda d: write_text(d / "a.txt", "w"), {"seq_len": 1}, "--calib_seq_len 1: at least 2"),
    "too little": (
        lambda d: write_text(d / "a.txt", words(0, 5)),
        {},
        "too little text to calibrate on: .*a.txt gives 6 tokens and one window needs 8: "
        "take a smaller --calib_seq_len or more text",
    ),
    "empty text": (lambda d: write_text(d / "a.txt", ""), {}, "gives 0 tokens"),
    "empty json lines": (lambda d: write_text(d / "a.jsonl", ""), {}, "has none"),
    "empty json": (lambda d: write_text(d / "a.json", ""), {}, "cannot read .*a.json"),
    "empty csv": (lambda d: write_text(d / "a.csv", ""), {}, "has none: choose with --calib_column"),
    "no such column": (
        lambda d: write_csv(d / "a.csv", ROWS),
        {"column": "body"},
        "no column 'body': .*a.csv has id, text: choose with --calib_column",
    ),
    "no text column": (
        lambda d: write_parquet(d / "a.parquet", {"x": ["w"], "y": ["w"]}),
        {},
        "no column 'text': .*a.parquet has x, y: choose with --calib_column",
    ),
    "numbers": (
        lambda d: write_parquet(d / "a.parquet", {"text": [1, 2]}),
        {},
        "a.parquet holds int values, neither text nor conversations",
    ),
    "list of numbers": (lambda d: write_lines(d / "a.jsonl", [{"text": [1]}]), {}, "holds list values"),
    "numbers as records": (lambda d: write_json(d / "a.json", [1]), {}, "holds int records"),
    "no chat template": (
        lambda d: write_lines(d / "a.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}]),
        {},
        "holds conversations, and the model's tokenizer has no chat template",
    ),
    "bad line": (lambda d: write_text(d / "a.jsonl", '{"text": "w1"}\n{"te'), {}, "line 2 is not JSON"),
    "bad json": (lambda d: write_text(d / "a.json", '[{"text": "w1"},'), {}, "cannot read .*a.json"),
    "bad gzip": (lambda d: bad_gzip(d / "a.txt.gz"), {}, "cannot read .*a.txt.gz"),
    "not gzip": (lambda d: write_text(d / "a.txt.gz", "w1"), {}, "cannot read .*a.txt.gz"),
    "bad parquet": (lambda d: write_text(d / "a.parquet", "w1"), {}, "cannot read .*a.parquet"),
    "latin-1": (lambda d: raw(d / "a.txt", "Stra\xdfe".encode("latin-1")), {}, "a.txt: not UTF-8 text"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line(case: str, tmp_path: Path, tokenizer: Any) -> None:
    make, options, line = REFUSALS[case]
    with pytest.raises(InputError, match=line) as refusal:
        load(make(tmp_path), tokenizer, **options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("use", "noun", "too_little", "flags", "flag"),
    [
        (CALIBRATION, "calibration", "too little text to calibrate on", "--calib_", "--calib_data"),
        (HELD_OUT, "held-out text", "too little held-out text", "--calib_", "--eval_data"),
        (EVALUATION, "held-out text", "too little held-out text", "--", "--data"),
    ],
    ids=["calibration", "held-out text", "evaluate.py"],
)
def test_messages_use_the_words_of_the_command(
    use: TextUse, noun: str, too_little: str, flags: str, flag: str, tmp_path: Path
) -> None:
    def refused(data: Path, tokenizer: Any, **options: Any) -> str:
        config = CalibrationConfig(**{"data": str(data), "samples": 4, "seq_len": 8, **options})
        with pytest.raises(InputError) as refusal:
            load_windows(config, tokenizer, log=lines.append, use=use)
        return str(refusal.value)

    lines: list[str] = []
    plain, chat = make_tokenizer(), make_tokenizer(template=TEMPLATE)
    # A path with the words of another use: messages must not change it.
    folder = tmp_path / "calibration: --calib_"
    folder.mkdir()
    text = write_text(folder / "a.txt", words(0, 20))
    turns = [{"role": "user", "content": words(0, 20)}]
    talk = write_lines(
        folder / "a.jsonl", [{"messages": turns}, {"messages": [{"role": "tool", "content": "w1"}]}]
    )
    two_columns = write_parquet(folder / "a.parquet", {"x": [1], "y": [2]})

    assert refused(text, plain, samples=0) == f"{flags}samples 0: at least 1 is needed"
    assert refused(text, plain, seq_len=1) == f"{flags}seq_len 1: at least 2 is needed"
    assert refused(text, plain, seq_len=30) == (
        f"{too_little}: {text} gives 21 tokens and one window needs 30: "
        f"take a smaller {flags}seq_len or more text"
    )
    for options in ({"column": "text"}, {}):
        assert refused(two_columns, plain, **options) == (
            f"no column 'text': {two_columns} has x, y: choose with {flags}column"
        )
    assert refused(two_columns, plain, column="x") == (
        f"{two_columns}, column x holds int values, neither text nor conversations: "
        f"choose another with {flags}column"
    )
    assert refused(talk, plain).endswith(f"no chat template: choose a text column with {flags}column")
    with (
        pytest.raises(InputError, match=rf"\. Without the hub, {flag} takes a local \.txt"),
        text_sources.reading(HubData("org/text"), use),
    ):
        raise ConnectionError
    assert lines == []
    tell = lines.append
    load_windows(CalibrationConfig(data=str(text), samples=9, seq_len=8), plain, log=tell, use=use)
    load_windows(CalibrationConfig(data=str(talk), samples=1, seq_len=8), chat, log=tell, use=use)
    assert lines == [
        f"{noun}: {text} has only 21 tokens: 2 windows of 8 instead of the 9 asked for",
        f"{noun}: the chat template refuses 1 conversations: no tool",
    ]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("wikitext", HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext:wikitext-103-raw-v1", HubData("Salesforce/wikitext", "wikitext-103-raw-v1", "train")),
        ("wikitext::test", HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("c4", HubData("allenai/c4", "en", "train")),
        ("pileval", HubData("mit-han-lab/pile-val-backup", None, "validation")),
        ("org/name", HubData("org/name")),
        ("org/name:a:b:c", HubData("org/name", "a", "b", "c")),
        ("org/name:::c", HubData("org/name", None, None, "c")),
        ("name", HubData("name")),
    ],
)
def test_names_and_ids(data: str, expected: HubData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitext").mkdir()  # a directory of that name is ignored
    check_source(CalibrationConfig(data=data))
    assert text_sources.locate(data) == expected


def kinds_of_datasets() -> list[str]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return sorted(_PACKAGED_DATASETS_MODULES)


@pytest.mark.parametrize("use", [CALIBRATION, HELD_OUT, EVALUATION], ids=lambda use: use.data)
def test_a_kind_of_file_is_no_dataset(
    use: TextUse, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` would read the files of the current directory."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "secret.txt", words(0, 200))
    write_lines(tmp_path / "secret.jsonl", [{"text": words(0, 200)}])
    names = kinds_of_datasets()
    assert {"text", "json", "csv", "parquet", "arrow", "imagefolder", "webdataset", "xml"} <= set(names)
    for name in names:
        for data in (name, f"{name}::train", f"{name}:default:train:text"):
            with pytest.raises(InputError, match=rf"^'{name}' is a kind of file.*give the file itself"):
                check_source(CalibrationConfig(data=data), use)
            with pytest.raises(InputError, match="is a kind of file"):
                load(data, tokenizer)


def test_a_kind_of_file_that_a_later_version_of_datasets_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import packaged_modules

    monkeypatch.setitem(packaged_modules._PACKAGED_DATASETS_MODULES, "scroll", ("x", "y"))
    with pytest.raises(InputError, match=r"^'scroll' is a kind of file"):
        text_sources.open_table(HubData("scroll"), seed=0)


@pytest.mark.parametrize(("data", "repo"), [("c4", "allenai/c4"), ("org/name:en", "org/name"), ("a:b", "a")])
def test_a_local_directory_is_not_read_in_place_of_the_hub(
    data: str, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_source(CalibrationConfig(data=data))
    (tmp_path / repo).mkdir(parents=True)
    write_text(tmp_path / repo / "secret.txt", words(0, 200))
    with pytest.raises(InputError, match=f"^{repo} is also a name in the current directory"):
        check_source(CalibrationConfig(data=data))


def test_checking_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import llm_quantize.config\n"
        "from llm_quantize.calibration.windows import CalibrationConfig, check_source\n"
        "check_source(CalibrationConfig(data='org/name'))\n"
        "print({'torch', 'datasets', 'transformers', 'pyarrow', 'huggingface_hub'} & set(sys.modules))"
    )
    folder = str(Path(text_sources.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"


def test_drawing_keeps_the_budget_and_is_uniform() -> None:
    middles = []
    for seed in range(20):
        drawn = draw((Item(i, 10, "x" * 10) for i in range(2000)), 1000, seed, 1000)
        assert len(drawn) == 100
        middles.append(sum(item.document for item in drawn) / 100)
    # The mean of 2000 uniform means: 999.5, give or take 577 / sqrt(2000) = 13.
    assert abs(sum(middles) / 20 - 999.5) < 52
    assert draw(iter([Item(0, 10, "x")]), 1000, 0, 1000) == [Item(0, 10, "x")]


def test_a_larger_budget_draws_the_same_and_more() -> None:
    items = [Item(i, 1 + i % 7, "x") for i in range(500)]
    few, many = (draw(items, budget, 3, 1000) for budget in (100, 400))
    assert many[: len(few)] == few
    assert sum(i.size for i in few[:-1]) < 100 <= sum(i.size for i in few)


def test_a_stream_is_read_no_further_than_needed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def rows(columns: Sequence[str]) -> Iterator[tuple[str]]:
        nonlocal read
        while True:
            read += 1
            yield (words(read % 1000 * 30, read % 1000 * 30 + 30),)

    table = Table("endless", ("text",), rows, streamed=True)
    monkeypatch.setattr(text_sources, "open_table", lambda source, **options: table)
    windows, log = load("org/endless", tokenizer, samples=16, seq_len=32)
    assert windows.tokens.shape == (16, 32)
    assert log == []
    # The pool must hold more than the 18 rows that 16 windows need.
    assert 25 < read < 200


@pytest.mark.parametrize(
    ("text", "limit", "pieces"),
    [
        ("", 5, [""]),
        ("abc", 5, ["abc"]),
        ("ab cd ef", 5, ["ab ", "cd ef"]),
        ("a b\nc d e", 6, ["a b\n", "c d e"]),
        ("abcdefgh", 3, ["abc", "def", "gh"]),
    ],
)
def test_text_is_split_at_lines_or_words(text: str, limit: int, pieces: list[str]) -> None:
    assert list(split_text(text, limit)) == pieces


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ([{"role": "user", "content": "a", "tool_calls": None}], [{"role": "user", "content": "a"}]),
        ({"role": ["user", "assistant"], "content": ["a", "b"]}, [("user", "a"), ("assistant", "b")]),
        (
            [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}],
            [("system", "a"), ("assistant", "b")],
        ),
        (
            [{"role": "assistant", "tool_calls": [1]}],
            [{"role": "assistant", "content": "", "tool_calls": [1]}],
        ),
        ([{"text": "a"}], None),
        (["a"], None),
        (3, None),
    ],
)
def test_messages(value: Any, messages: Any) -> None:
    expected = messages and [
        m if isinstance(m, dict) else dict(zip(("role", "content"), m, strict=True)) for m in messages
    ]
    assert as_messages(value) == expected


@pytest.mark.parametrize(
    ("tokenizer_limit", "model_limit", "longest"),
    [
        (4096, 2048, 2048),
        (512, 2048, 512),
        (int(1e30), 2048, 2048),
        (int(1e30), None, None),
        (512, None, 512),
    ],
)
def test_longest_window(tokenizer_limit: int, model_limit: int | None, longest: int | None) -> None:
    class Limited:
        model_max_length = tokenizer_limit

    assert longest_window(Limited(), model_limit) == longest


@pytest.mark.parametrize(
    ("tokenizer_limit", "model_limit", "told"),
    [
        (4096, 2048, "--calib_seq_len 3000 is more than the model takes: at most 2048"),
        (2048, 2048, "--calib_seq_len 3000 is more than the model takes: at most 2048"),
        (int(1e30), 2048, "--calib_seq_len 3000 is more than the model takes: at most 2048"),
        (512, 2048, "--calib_seq_len 3000 is more than the tokenizer takes, by the model_max_length"),
        (512, 32768, "at most 512, or correct that file"),
        (512, None, "--calib_seq_len 3000 is more than the tokenizer takes, by the model_max_length"),
    ],
)
def test_a_window_that_is_too_long_names_who_says_so(
    tokenizer_limit: int, model_limit: int | None, told: str
) -> None:
    class Limited:
        model_max_length = tokenizer_limit

    with pytest.raises(InputError, match=re.escape(told)):
        check_window_length("--calib_seq_len", 3000, Limited(), model_limit)
    check_window_length("--calib_seq_len", 512, Limited(), model_limit)
    check_window_length("--calib_seq_len", 10**6, object(), None)
