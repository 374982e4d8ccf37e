"""A directory that is complete or absent: made in a staging place beside the target, then renamed into place.

At every instant the target is absent, the old directory or the new one, complete. The staging place may outlive a
run that was interrupted; a lock in it keeps a second run away. Knows nothing of what the directory holds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm_quantize.errors import InputError, WorkError
from llm_quantize.io.untrusted import stays_inside

GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------------
# Before the work


def check_target(path: Path, overwrite: bool, bytes_needed: int = 0, source: Path | None = None) -> None:
    """Raises `InputError` if a checkpoint of about `bytes_needed` bytes could not be published at `path`."""
    path = Path(path)
    target = Path(os.path.realpath(path))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin or origin in target.parents:
            raise InputError(
                f"{path} is the source model's directory or inside it: choose another --output_path"
            )
        if target in origin.parents and target.exists():
            raise InputError(f"{path} holds the source model: choose another --output_path")
    if target.exists():
        if not target.is_dir():
            raise InputError(f"{path} exists and is not a directory: choose another --output_path")
        if not overwrite:
            raise InputError(f"{path} exists: use --overwrite, or choose another --output_path")
        if target.parent == target or target.is_mount():
            raise InputError(f"{path} is a mount point, which cannot be replaced: name a directory inside it")
        try:
            replaceable = (target / "config.json").is_file() or not any(target.iterdir())
        except OSError as error:
            raise InputError(f"cannot look into {path}: {error.strerror}") from None
        if not replaceable:
            raise InputError(
                f"{path} holds files but no config.json, so it is no checkpoint that --overwrite may delete: "
                "choose another --output_path"
            )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory: choose another --output_path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not writable: choose another --output_path")
    free = shutil.disk_usage(parent).free + _held(_work_directory_of(target))
    if free < bytes_needed:
        raise InputError(
            f"too little disk at {parent}: about {size(bytes_needed)} needed, {size(free)} free: "
            f"free {size(bytes_needed - free)} or choose another --output_path"
        )


def check_before_work(path: Path, overwrite: bool) -> None:
    """As `check_target`, but where an earlier run's staging place waits: only its end may be missing."""
    if not _work_directory_of(Path(os.path.realpath(path))).exists():
        check_target(path, overwrite)


def size(count: int) -> str:
    """A number of bytes as people read it."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{-(-count // 1024)} KiB"


def _work_directory_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _held(directory: Path) -> int:
    """Bytes on disk of a staging place that an earlier run left."""
    total = 0
    with suppress(OSError):
        for path in directory.rglob("*"):
            total += path.lstat().st_blocks * 512
    return total


# ------------------------------------------------------------------------------------------------------------
# Errors and durability


def failure(error: OSError, where: Path, count: int = 0) -> WorkError:
    """One line for an error in writing about `count` bytes (0: few) into directory `where`."""
    text = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"cannot write to {where}: {text}")
    if not count:
        return WorkError(f"disk full at {where}: free some space and run again")
    free = shutil.disk_usage(where).free
    missing = f"{size(count - free)} more" if count > free else "space (a quota may be reached)"
    return WorkError(
        f"disk full at {where}: {size(count)} to write, {size(free)} free: free {missing} and run again"
    )


def sync(path: Path) -> None:
    """fsync of a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------
# The staging place


class AtomicDirectory:
    """Context manager: a locked place beside `target` where its next content is made.

    `work` is the place, `content` the directory in it that `publish` renames to the target. On leaving without
    that, the place stays if `keep` is set, as it is where an earlier run left a journal, else nothing stays.
    Errors: `InputError` for the target, and where another run holds the lock; `WorkError` in publishing.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        self.shown = Path(target)
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.work = _work_directory_of(self.target)
        self.content = self.work / "checkpoint"
        self.keep = False
        self._old = self.target.parent / f".{self.target.name}.old"
        self._made: list[Path] = []  # parents that were not there before
        self._lock = -1
        self._published = False

    def __enter__(self) -> Self:
        check_before_work(self.shown, self.overwrite)
        try:
            missing = [p for p in self.target.parents if not p.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                self._made.append(parent)
            self._take_lock()
            self._recover()
            # Published, and killed before the rest was removed, or killed at the very start.
            if not (self.content.is_dir() and (self.work / "journal").is_file()):
                self.clear()
            self.keep = (self.work / "journal").is_file()
            check_target(self.shown, self.overwrite)
        except OSError as error:
            self._leave()
            raise InputError(f"cannot write to {self.target.parent}: {error.strerror}") from None
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _take_lock(self) -> None:
        while True:
            self.work.mkdir(exist_ok=True)
            handle = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise  # a file system without locks: nobody is kept away there
                # Whoever held it may have removed the file, and a lock on a file that is gone keeps nobody away.
                if os.fstat(handle).st_ino == (self.work / "lock").stat().st_ino:
                    self._lock = handle
                    return
            except BlockingIOError:
                os.close(handle)
                raise InputError(
                    f"another run is writing {self.shown}: wait for it, or choose another --output_path"
                ) from None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _recover(self) -> None:
        """What a run left that was killed between the two renames of `publish`, or just after them."""
        if self._old.exists():
            if self.target.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.target)

    def clear(self) -> None:
        """Removes what an earlier run left, but for the lock. Errors: `WorkError`."""
        self.keep = False
        try:
            for path in self.work.iterdir():
                if path.name == "lock":
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self.content.mkdir()
        except OSError as error:
            raise failure(error, self.target.parent) from None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A file of the content with one JSON object, durable on return."""
        self.write(name, as_json(content).encode())

    def write(self, name: str, data: bytes) -> None:
        """A file of the content, durable on return."""
        if Path(name).name != name:
            raise ValueError(f"not a plain file name: {name}")
        try:
            (self.content / name).write_bytes(data)
            sync(self.content / name)
        except OSError as error:
            raise failure(error, self.target.parent) from None

    def copy(self, files: Sequence[Path]) -> tuple[str, ...]:
        """Copies files into the content, durable on return; the names left out: links that lead away."""
        skipped = []
        try:
            for path in files:
                if not stays_inside(path):
                    skipped.append(path.name)
                    continue
                shutil.copyfile(path, self.content / path.name)
                sync(self.content / path.name)
        except OSError as error:
            raise failure(error, self.target.parent) from None
        return tuple(skipped)

    def make_durable(self) -> None:
        """Makes files that another program left in the content durable, and as readable as files are here."""
        mask = os.umask(0)
        os.umask(mask)
        try:
            for path in self.content.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~mask)
                sync(path)
        except OSError as error:
            raise failure(error, self.target.parent) from None

    def publish(self) -> None:
        """Puts `content`, which must be complete, in the target's place."""
        try:
            replaces = self.target.exists()
            sync(self.content)
            if replaces:
                check_target(self.shown, self.overwrite)  # it may have appeared or changed since
                self.target.rename(self._old)
            try:
                self.content.rename(self.target)
            except BaseException:
                if replaces and not self.target.exists():
                    self._old.rename(self.target)
                raise
            self._published = True
            sync(self.target.parent)
            if replaces:
                shutil.rmtree(self._old, ignore_errors=True)
        except OSError as error:
            raise failure(error, self.target.parent) from None

    def _leave(self) -> None:
        if self._lock >= 0:
            if self._published or not self.keep:
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        else:
            with suppress(OSError):  # not empty: another run's, or never made
                self.work.rmdir()
        if not self._published:
            for parent in reversed(self._made):
                with suppress(OSError):  # not empty: what is kept lies there
                    parent.rmdir()


def as_json(content: dict[str, Any]) -> str:
    """A JSON file's text."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
