"""Test that paths of the machine are taken out of published JSON files, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.io.machine_paths import json_without_paths, paths_of_this_machine, without_paths

PATHS = ("/home/u", "/data/the model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/u/models/x", "x"),
        ("/home/u/models/x/", "x"),
        ("/home/u", "u"),
        ("/data/the model/tokenizer.json", "tokenizer.json"),
        ("file:///home/u/models/x", "x"),
        ("file:/home/u/models/x", "x"),
        ("FILE://localhost/home/u/models/x", "x"),
        ("file:///data/the%20model/x.json", "x.json"),
        ("file:///data/the model/x.json", "x.json"),
        # not of this machine, or no path at all
        ("/home/user2/x", "/home/user2/x"),
        ("file:///usr/share/x", "file:///usr/share/x"),
        ("https://example.org/home/u/x", "https://example.org/home/u/x"),
        ("see /home/u/models/x", "see /home/u/models/x"),
        ("org/model", "org/model"),
        ("", ""),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert without_paths(text, PATHS) == expected
    assert without_paths({"a": [{"b": text}]}, PATHS) == {"a": [{"b": expected}]}
    assert without_paths({text: 1}, PATHS) == {expected: 1}


def test_other_values_stay() -> None:
    value: dict[str, Any] = {"a": 3, "b": None, "c": True, "d": 0.5, "e": [], "f": {}}
    assert without_paths(value, PATHS) == value


def test_keys_that_become_the_same_are_all_kept() -> None:
    value = {"/home/u/a/x": 1, "x": 2, "/home/u/b/x": 3, "x 2": 4}
    assert sorted(without_paths(value, PATHS).values()) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "value",
    [
        {"model": {"vocab": {"/root": 0, "/root/x": 1}, "merges": [["/root", "/x"]]}},
        {"added_tokens": [{"id": 0, "content": "/root"}]},
        {"added_tokens_decoder": {"0": {"content": "/root"}}},
        {f"token {i}": i for i in range(300)} | {"/root": 300},  # as vocab.json has them
    ],
)
def test_tokens_are_no_paths(value: Any) -> None:
    assert without_paths(value, ("/root",)) == value


# --- bytes of files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b'{ "a":1,\n "b": "/etc/x" }',
        b"not JSON, of /home/u",
        b'{"a": "see /home/u"}',
        b"\xff\xfe /home/u",
        b"[" * 5000 + b'"/home/u/x"' + b"]" * 5000,
    ],
)
def test_a_file_without_such_paths_keeps_its_bytes(data: bytes) -> None:
    assert json_without_paths(data, PATHS) == data


@pytest.mark.parametrize(
    "written",
    [
        '{"a": "/home/\u00fc/x", "b": "\u00e9"}',
        '{"a": "/home/\\u00fc/x", "b": "\u00e9"}',
        '{"a": "\\/home\\/\\u00fc\\/x", "b": "\u00e9"}',
        '{"a": "file:///home/%C3%BC/x", "b": "\u00e9"}',
    ],
)
def test_a_path_is_found_however_json_spells_it(written: str) -> None:
    found = json_without_paths(written.encode(), ("/home/\u00fc",))
    assert json.loads(found) == {"a": "x", "b": "\u00e9"}
    assert "\u00e9".encode() in found


def test_half_of_a_surrogate_pair_stays_an_escape() -> None:
    data = b'{"a": "/home/u/x", "b": "\\ud800"}'
    assert json.loads(json_without_paths(data, PATHS)) == {"a": "x", "b": "\ud800"}


# --- which paths ----------------------------------------------------------------------------------------------


def test_the_directory_in_all_its_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/u")
    found = paths_of_this_machine(Path("link"))
    assert {str(tmp_path / "link"), str(tmp_path / "real"), "/home/u"} <= set(found)
    assert all(path.startswith("/") for path in found)


@pytest.mark.parametrize("home", ["/", "relative", ""])
def test_a_home_that_is_no_place_of_its_own(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything lies below `/`: nothing could be told from a path of this machine."""
    monkeypatch.setenv("HOME", home)
    assert set(paths_of_this_machine(tmp_path)) <= {str(tmp_path), str(tmp_path.resolve())}


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert set(paths_of_this_machine(tmp_path)) == {str(tmp_path), str(tmp_path.resolve())}
