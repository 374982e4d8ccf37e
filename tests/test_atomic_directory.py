"""Test that a target is the old or the new directory at every moment, and that only one run writes it."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_quantize.errors import InputError, WorkError
from llm_quantize.io.atomic_directory import AtomicDirectory, check_target


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def write(target: Path, text: str = "new", *, overwrite: bool = False) -> None:
    with AtomicDirectory(target, overwrite=overwrite) as output_dir:
        output_dir.write_json("config.json", {"text": text})
        output_dir.publish()


def text(target: Path) -> str:
    found = json.loads((target / "config.json").read_text(encoding="utf-8"))["text"]
    assert isinstance(found, str)
    return found


# --- publishing -------------------------------------------------------------------------------------------


def test_publishing(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "a" / "b" / "out", overwrite=False) as output_dir:
        output_dir.write_json("config.json", {"text": "é"})
        assert names(tmp_path / "a" / "b") == {".out.partial"}
        output_dir.publish()
    assert names(tmp_path / "a" / "b") == {"out"}
    assert names(tmp_path / "a" / "b" / "out") == {"config.json"}
    assert text(tmp_path / "a" / "b" / "out") == "é"


def test_leaving_without_publishing_removes_everything(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "a" / "out", overwrite=False) as output_dir:
        output_dir.write_json("config.json", {})
    assert names(tmp_path) == set()


def test_kept_content_is_there_on_the_next_entry(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        output_dir.write_json("config.json", {"text": "half"})
        (output_dir.work / "journal").write_text("something")
        output_dir.keep = True
    for _ in range(2):  # entering without a change keeps it
        with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
            assert output_dir.keep
            assert text(output_dir.content) == "half"
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        output_dir.clear()
        assert names(output_dir.content) == set()
    assert names(tmp_path) == set()


def test_overwrite_replaces_the_target_at_the_end(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "old.bin").write_text("old")
    with AtomicDirectory(tmp_path / "out", overwrite=True) as output_dir:
        output_dir.write_json("config.json", {"text": "new"})
        assert text(tmp_path / "out") == "old"
        output_dir.publish()
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"config.json"}
    assert text(tmp_path / "out") == "new"


def test_overwrite_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert text(tmp_path / "real") == "new"
    assert names(tmp_path) == {"real", "link"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_the_old_target_is_restored_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "checkpoint":
            assert "out" not in names(tmp_path)  # the old one has been moved away by now
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((WorkError, KeyboardInterrupt)):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert text(tmp_path / "out") == "old"


def test_a_target_that_appears_during_the_work(tmp_path: Path) -> None:
    def work() -> None:
        with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
            output_dir.write_json("config.json", {"text": "new"})
            write_other()
            output_dir.publish()

    def write_other() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text('{"text": "someone else\'s"}')

    with pytest.raises(InputError, match="exists: use --overwrite"):
        work()
    assert names(tmp_path) == {"out"}
    assert text(tmp_path / "out") == "someone else's"


# --- after a kill -----------------------------------------------------------------------------------------


def test_killed_between_the_renames(tmp_path: Path) -> None:
    """The old target is restored, nothing of the new one is lost, and then it is published."""
    write(tmp_path / "out", "old")
    with AtomicDirectory(tmp_path / "out", overwrite=True) as output_dir:
        output_dir.write_json("config.json", {"text": "new"})
        (output_dir.work / "journal").write_text("something")
        output_dir.keep = True
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with (
        pytest.raises(InputError, match="exists: use --overwrite"),
        AtomicDirectory(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("not refused")
    assert names(tmp_path) == {"out", ".out.partial"}
    with AtomicDirectory(tmp_path / "out", overwrite=True) as output_dir:
        assert text(tmp_path / "out") == "old"
        assert text(output_dir.content) == "new"
        output_dir.take_over(["config.json"])
        output_dir.publish()
    assert names(tmp_path) == {"out"}
    assert text(tmp_path / "out") == "new"


def test_killed_after_the_renames(tmp_path: Path) -> None:
    write(tmp_path / "out", "new")
    write(tmp_path / ".out.old", "old")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "journal").write_text("something")
    with (
        pytest.raises(InputError, match="exists: use --overwrite"),
        AtomicDirectory(tmp_path / "out", overwrite=False),
    ):
        pytest.fail("not refused")
    assert names(tmp_path) == {"out"}
    assert text(tmp_path / "out") == "new"


# --- one run at a time ------------------------------------------------------------------------------------


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        output_dir.write_json("config.json", {"text": "new"})
        with (
            pytest.raises(InputError, match=r"another run is writing .*/out: wait for it") as caught,
            AtomicDirectory(tmp_path / "out", overwrite=False),
        ):
            pytest.fail("not refused")
        assert "\n" not in str(caught.value)
        assert names(output_dir.content) == {"config.json"}
        output_dir.publish()
    assert text(tmp_path / "out") == "new"


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom llm_quantize.io.atomic_directory import AtomicDirectory\n"
        "AtomicDirectory(Path(sys.argv[1]), overwrite=False).__enter__()\nos._exit(9)"
    )
    module = Path(sys.modules["llm_quantize.io.atomic_directory"].__file__ or "").parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out"), str(module)], check=False)
    assert done.returncode == 9
    assert names(tmp_path) == {".out.partial"}
    write(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("llm_quantize.io.atomic_directory.fcntl.flock", unsupported)
    write(tmp_path / "out")
    assert text(tmp_path / "out") == "new"


# --- the comparison before the rename ---------------------------------------------------------------------


def test_names_of_files(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        for name in ("../x", "/x", "a/../../x", "a//x", ".", "", "a/"):
            with pytest.raises(ValueError, match="not a name inside"):
                output_dir.write(name, b"")
        output_dir.write("templates/tool.jinja", b"inner")
        output_dir.publish()
    assert (tmp_path / "out" / "templates" / "tool.jinja").read_bytes() == b"inner"
    assert names(tmp_path) == {"out"}


def damage(folder: Path, what: str) -> None:
    config = folder / "config.json"
    if what == "a bit":
        data = bytearray(config.read_bytes())
        data[3] ^= 1
        config.write_bytes(data)
    elif what == "cut":
        config.write_bytes(config.read_bytes()[:-1])
    elif what == "longer":
        config.write_bytes(config.read_bytes() + b"\n")
    elif what == "gone":
        config.unlink()
    elif what == "a link":
        config.rename(folder.parent / "moved")
        config.symlink_to("../moved")
    elif what == "a stray file":
        (folder / "extra.pkl").write_bytes(b"x")
    elif what == "a stray directory":
        (folder / "extra").mkdir()
    elif what == "a stray file inside":
        (folder / "templates" / "extra.jinja").write_bytes(b"x")


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        ("a bit", "config.json", "differs from what was written: check the disk"),
        ("cut", "config.json", "differs from what was written"),
        ("longer", "config.json", "differs from what was written"),
        ("gone", "config.json", "is missing"),
        ("a link", "config.json", "differs from what was written"),
        ("a stray file", "extra.pkl", "none of the files that were written: take it away"),
        ("a stray directory", "extra", "none of the files that were written"),
        ("a stray file inside", "templates/extra.jinja", "none of the files that were written"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_what_was_not_written_is_not_published(
    what: str, name: str, words: str, old: bool, tmp_path: Path
) -> None:
    if old:
        write(tmp_path / "out", "old")
    with AtomicDirectory(tmp_path / "out", overwrite=True) as output_dir:
        output_dir.write_json("config.json", {"text": "new"})
        output_dir.write("templates/tool.jinja", b"inner")
        damage(output_dir.content, what)
        with pytest.raises(WorkError, match=f"^{name} .*{words}"):
            output_dir.publish()
    assert names(tmp_path) == ({"out"} if old else set())
    assert not old or text(tmp_path / "out") == "old"


def test_files_of_another_program_are_taken_over_as_they_are(tmp_path: Path) -> None:
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        (output_dir.content / "model.bin").write_bytes(b"x" * 3_000_000)
        output_dir.take_over(["model.bin"])
        output_dir.publish()
    assert (tmp_path / "out" / "model.bin").stat().st_size == 3_000_000
    with AtomicDirectory(tmp_path / "other", overwrite=True) as output_dir:
        output_dir.write_json("config.json", {})
        (output_dir.content / "model.bin").write_bytes(b"x" * 3_000_000)
        output_dir.take_over(["model.bin"])
        (output_dir.content / "model.bin").write_bytes(b"x" * 2_999_999 + b"y")
        with pytest.raises(WorkError, match=r"model\.bin .* differs"):
            output_dir.publish()


# --- the target before the work ---------------------------------------------------------------------------


def test_targets_that_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "source").mkdir()
    check_target(tmp_path / "a" / "b", False, 1000, tmp_path / "source")
    check_target(tmp_path / "empty", True)
    assert names(tmp_path) == {"empty", "source"}


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    (tmp_path / "models" / "source").mkdir(parents=True)
    (tmp_path / "models" / "config.json").write_text("{}")
    source = tmp_path / "models" / "source"
    (source / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)

    def refused(message: str, path: Path, overwrite: bool = True, needed: int = 0) -> None:
        with pytest.raises(InputError, match=message) as caught:
            check_target(path, overwrite, needed, source)
        assert "\n" not in str(caught.value)

    refused("exists: use --overwrite", tmp_path / "photos", overwrite=False)
    refused("no checkpoint that --overwrite may delete", tmp_path / "photos")
    refused("exists and is not a directory", tmp_path / "file")
    refused("file is not a directory", tmp_path / "file" / "out")
    refused("source model's directory or inside", source)
    refused("source model's directory or inside", source / "out")
    refused("source model's directory or inside", tmp_path / "link")
    refused("holds the source model", tmp_path / "models")
    refused(r"too little disk at .* free \d+\.\d\d GiB or choose", tmp_path / "out", needed=1 << 60)
    monkeypatch.setattr("llm_quantize.io.atomic_directory.os.access", lambda *_: False)
    refused("is not writable", tmp_path / "new" / "out")
    assert names(tmp_path) == {"file", "photos", "models", "link"}


def test_mount_point_is_refused() -> None:
    with pytest.raises(InputError, match="mount point"):
        check_target(Path("/proc"), True)


def test_the_target_is_checked_on_entry(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    with pytest.raises(InputError, match="no checkpoint"):
        write(tmp_path / "photos", overwrite=True)
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(InputError, match="cannot write to"):
        write(tmp_path / "new" / ("x" * 250))
    assert names(tmp_path) == set()
