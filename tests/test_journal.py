"""Test that a journal lists its intact entries: it ends at the first damaged line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.io import journal
from llm_quantize.io.journal import Journal

ENTRIES: list[dict[str, Any]] = [{"run": {"--bits": 4}}, {"step": 1, "text": "é\n"}, {"step": [2, None, 0.5]}]


def write(path: Path, entries: list[dict[str, Any]]) -> bytes:
    log = Journal(path)
    log.keep(0)
    for entry in entries:
        log.append(entry)
    log.close()
    return path.read_bytes()


def test_appended_entries_are_read(tmp_path: Path) -> None:
    data = write(tmp_path / "journal", ENTRIES)
    assert Journal(tmp_path / "journal").entries == ENTRIES
    assert data.count(b"\n") == len(ENTRIES)
    assert Journal(tmp_path / "none").entries == []


def test_every_cut_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = write(path, ENTRIES)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        log = Journal(path)
        whole = data[:length].count(b"\n")
        assert log.entries == ENTRIES[:whole]
        log.keep(whole)
        for entry in ENTRIES[whole:]:
            log.append(entry)
        log.close()
        assert path.read_bytes() == data


def test_every_flipped_bit_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = write(path, ENTRIES)
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 1
        path.write_bytes(damaged)
        assert Journal(path).entries == ENTRIES[: data[:index].count(b"\n")]


def test_fewer_entries_can_be_kept(tmp_path: Path) -> None:
    write(tmp_path / "journal", ENTRIES)
    log = Journal(tmp_path / "journal")
    log.keep(1)
    log.append({"new": 1})
    log.close()
    assert Journal(tmp_path / "journal").entries == [ENTRIES[0], {"new": 1}]


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "journal", ENTRIES)
    monkeypatch.setattr(journal, "MAX_BYTES", 10)
    assert Journal(tmp_path / "journal").entries == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=80), max_size=6).map(b"\n".join))
def test_any_bytes_can_be_opened(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        path.write_bytes(data)
        assert Journal(path).entries == []
