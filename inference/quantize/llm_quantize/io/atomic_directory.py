"""Replace a directory atomically: fill a hidden work directory beside the target, then rename it to the target.

At every instant the target is absent, the complete old directory or the complete new one. The work directory may
remain after an interrupted run, so that the next run can continue; a lock in it refuses a second run at the same
time. This module does not know what the directory holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from llm_quantize.errors import InputError, WorkError
from llm_quantize.io.json_text import as_json
from llm_quantize.io.manifest import Manifest, whole
from llm_quantize.io.untrusted import check_is_text

GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------------
# Before the work


def check_target(path: Path, overwrite: bool, bytes_needed: int = 0, source: Path | None = None) -> None:
    """Check that a checkpoint of about `bytes_needed` bytes can be published at `path`.

    overwrite: whether an existing checkpoint there may be replaced.
    source: the directory of the model to quantize, which must not be replaced.

    Raises InputError: the target's name is not UTF-8, or the target exists, holds something other than a checkpoint,
    overlaps with `source`, is not writable, or the disk has too little space.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    check_is_text(target)  # what is written is read back
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
    free = shutil.disk_usage(parent).free + _leftover_bytes(_work_directory(target))
    if free < bytes_needed:
        raise InputError(
            f"too little disk at {parent}: about {human_size(bytes_needed)} needed, {human_size(free)} free: "
            f"free {human_size(bytes_needed - free)} or choose another --output_path"
        )


def check_before_work(path: Path, overwrite: bool) -> None:
    """Check the target as `check_target` does, unless an interrupted run left a work directory.

    Such a run may already have moved the old target away: `AtomicDirectory` restores it, then checks.
    """
    if not _work_directory(Path(os.path.realpath(path))).exists():
        check_target(path, overwrite)


def human_size(count: int) -> str:
    """Format a number of bytes for people: `1.50 GiB`, `12 KiB`."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{-(-count // 1024)} KiB"


def _work_directory(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def _leftover_bytes(directory: Path) -> int:
    """Return the bytes on disk of a work directory that an earlier run left."""
    total = 0
    with suppress(OSError):
        for path in directory.rglob("*"):
            total += path.lstat().st_blocks * 512
    return total


# ------------------------------------------------------------------------------------------------------------
# Errors and durability


def write_error(error: OSError, where: Path, count: int = 0) -> WorkError:
    """Turn an error in writing into a one-line `WorkError` that names the directory and the remedy.

    where: the directory; count: the bytes to write, 0 for few.
    """
    text = error.strerror or str(error).strip().partition("\n")[0] or type(error).__name__
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return WorkError(f"cannot write to {where}: {text}")
    if not count:
        return WorkError(f"disk full at {where}: free some space and run again")
    free = shutil.disk_usage(where).free
    missing = f"{human_size(count - free)} more" if count > free else "space (a quota may be reached)"
    return WorkError(
        f"disk full at {where}: {human_size(count)} to write, {human_size(free)} free: free {missing} and run again"
    )


def fsync_path(path: Path) -> None:
    """Call fsync on a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------
# The atomic directory


class AtomicDirectory:
    """Lock a work directory beside `target`; `publish` replaces the target with its content. A context manager.

    shown: the target as the user wrote it, for messages; target: the same with links resolved.
    work: the hidden directory beside the target, which holds the lock, the journal and `content`.
    content: the directory that `publish` renames to the target. manifest: what its files must hold.
    keep: whether `work` remains when the context ends without `publish`. Set on entry where an earlier run left a
    journal.

    Raises InputError on entry: a target that `check_target` refuses, or another run holds the lock.
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        self.shown = Path(target)
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.work = _work_directory(self.target)
        self.content = self.work / "checkpoint"
        self.manifest = Manifest()
        self.keep = False
        self._old = self.target.parent / f".{self.target.name}.old"
        self._created_parents: list[Path] = []
        self._lock = -1
        self._published = False

    def __enter__(self) -> Self:
        check_before_work(self.shown, self.overwrite)
        try:
            missing = [p for p in self.target.parents if not p.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                self._created_parents.append(parent)
            self._take_lock()
            self._recover()
            # Without both, the earlier run was killed at its very start, or after it had published.
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
        """Lock the work directory. Raises InputError where another run holds the lock."""
        while True:
            self.work.mkdir(exist_ok=True)
            handle = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise  # else the file system has no locks: continue without one
                # The run that held the lock may have removed the file: then lock the new file instead.
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
        """Restore the old target, or delete it, if a run was killed between or after the renames of `publish`."""
        if self._old.exists():
            if self.target.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.target)

    def clear(self) -> None:
        """Empty the work directory, except the lock, and create `content` anew. Raises WorkError."""
        self.keep = False
        self.manifest.clear()
        try:
            for path in self.work.iterdir():
                if path.name != "lock":
                    _remove(path)
            self.content.mkdir()
        except OSError as error:
            raise write_error(error, self.target.parent) from None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON object as file `name` of the content, durable on return. Raises WorkError."""
        self.write(name, as_json(content).encode())

    def write(self, name: str, data: bytes) -> None:
        """Write file `name` of the content, durable on return; `publish` compares it.

        name: a path inside the content, with `/`. Raises ValueError for one that leads out of it; WorkError.
        """
        path = self.content / name
        inner = PurePosixPath(name)
        if inner.is_absolute() or ".." in inner.parts or not inner.parts or str(inner) != name:
            raise ValueError(f"not a name inside the directory: {name}")
        try:
            if path.parent != self.content:
                path.parent.mkdir(parents=True, exist_ok=True)
                fsync_path(self.content)
            path.write_bytes(data)
            fsync_path(path)
            if path.parent != self.content:
                fsync_path(path.parent)
        except OSError as error:
            raise write_error(error, self.target.parent) from None
        self.manifest.add(name, whole(data))

    def take_over(self, names: Iterable[str]) -> None:
        """Take files of the content that another program wrote for what `publish` must find. Raises WorkError."""
        try:
            for name in names:
                self.manifest.add_as_it_is(self.content, name)
        except OSError as error:
            raise WorkError(f"cannot read {name} in {self.content}: {error.strerror}: run again") from None

    def keep_only(self, names: Collection[str]) -> None:
        """Remove all of the content but the files `names`. Raises WorkError."""
        try:
            for path in self.content.iterdir():
                if path.name not in names:
                    _remove(path)
        except OSError as error:
            raise write_error(error, self.target.parent) from None

    def make_durable(self) -> None:
        """Make files durable that another program wrote into the content, and set their usual permissions.

        Raises WorkError.
        """
        mask = os.umask(0)
        os.umask(mask)
        try:
            for path in self.content.rglob("*"):
                if path.is_file():
                    path.chmod(0o666 & ~mask)
                fsync_path(path)
        except OSError as error:
            raise write_error(error, self.target.parent) from None

    def publish(self) -> None:
        """Compare `content` with `manifest`, then replace the target with it.

        If the rename fails, the old target is restored. Raises InputError where the target has appeared or changed
        since entry; WorkError, which names a file that differs, is missing, or was never written by this run.
        """
        try:
            replaces = self.target.exists()
            fsync_path(self.content)
            if replaces:
                check_target(self.shown, self.overwrite)  # it may have appeared or changed since entry
            self.manifest.compare(self.content)
            if replaces:
                self.target.rename(self._old)
            try:
                self.content.rename(self.target)
            except BaseException:
                if replaces and not self.target.exists():
                    self._old.rename(self.target)
                raise
            self._published = True
            fsync_path(self.target.parent)
            if replaces:
                shutil.rmtree(self._old, ignore_errors=True)
        except OSError as error:
            raise write_error(error, self.target.parent) from None

    def _leave(self) -> None:
        """Release the lock and remove the work directory, unless it is kept for the next run.

        Parents that were created on entry are removed where they are empty, unless the target was published.
        """
        if self._lock >= 0:
            if self._published or not self.keep:
                shutil.rmtree(self.work, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        else:
            with suppress(OSError):  # it belongs to another run, or does not exist
                self.work.rmdir()
        if not self._published:
            for parent in reversed(self._created_parents):
                with suppress(OSError):  # not empty: it holds what is kept
                    parent.rmdir()


def _remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that it holds. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
