"""What lies beside the weights: tokenizer, configs, templates, code, licence, as it was when the run began."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.machine_paths import json_without_paths, paths_of_this_machine
from llm_quantize.io.untrusted import (
    LARGEST_READ,
    check_files,
    copy_limited,
    entries_of,
    is_read,
    read_limited,
    stays_inside,
)
from llm_quantize.model.weight_files import Scratch

# Directories that belong to a tokenizer: transformers' own, of further chat templates, and those of remote code.
_TOKENIZERS = re.compile(r"additional_chat_templates|([\w.-]+[_-])?tokenizer([_-][\w.-]+)?", re.ASCII)
LARGEST_COPIED = 64 << 20  # bytes of a file that no reader of checkpoints needs, such as a picture
LARGEST_TOTAL = 2 << 30  # bytes of all side files
CARD, CARD_BYTES = "README.md", 1 << 20
_NAMED = 12  # files that the line on what is left out names

_ANY_NAME = re.IGNORECASE | re.DOTALL  # a name may hold line ends
# Python objects, programs, and archives of both, packed or not.
_CODE = re.compile(
    r".*\.(pkl|pickle|pk?|joblib|jbl|jl|dill|sav|cloudpickle|shelve|marshal|skops|nemo|pd(params|opt|model|iparams|ema)|"
    r"pt2|ptl|torchscript|mar|np[yz]|py[cod]|so|dll|dylib|exe|llamafile|tar|tgz|zip|7z|rar|whl|egg|jar)(\.(gz|bz2|xz|lzma|zst|lz4|z))?",
    _ANY_NAME,
)
_CODE_BEGINS = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04|\x7fELF")  # a pickle, a zip archive, a program
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|gguf|ggml|h5|hdf5|msgpack|onnx|onnx_data|ckpt|pb|tflite|mlmodel|keras|distcp|params|ot)",
    _ANY_NAME,
)
_ADAPTER = re.compile(r"adapter_(config|model).*", _ANY_NAME)
_QUANTIZATION = re.compile(
    r"((hf|mlc)_)?(quant|quantize|quantization|compression|sparsity|gptq|awq|hqq|inc|nncf|quark|modelopt|auto_?round|"
    r"torchao|aqlm|exl[23]?)_(config|args|log|strategy|recipe|state).*|(recipe|quantization|quant)\.ya?ml|quanto_qmap\.json|qconfig\.json|measurement\.json|job_new\.json|imatrix.*",
    _ANY_NAME,
)


class SideFiles:
    """The files beside the weights of a model's directory, copied to a directory of their own when this is made.

    What is checked, read and published is the copy, so that a later change of the directory changes nothing.

    path: the copy, which has the directory's name. digests: xxh3 of 128 bits, in hex, of each file as it was in the
    directory, by its name there with `/`. total_bytes: of them. left_out: what is not copied, by name, with the reason.
    card: the beginning of README.md, which holds its front matter; None where there is none.

    Raises InputError: a file that a run reads is a pipe or a device, leads out of the directory, or is far too large.
    Raises WorkError: the copy cannot be stored.
    """

    def __init__(self, directory: Path) -> None:
        check_files(directory)
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json: give a Hugging Face model directory")
        self.directory = directory
        self.digests: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.total_bytes = 0
        self.card: bytes | None = None
        try:
            self._scratch: Scratch | None = Scratch()
            self.path = self._scratch.path / _name_of(directory)
            self.path.mkdir()
            for entry in entries_of(directory):
                if _TOKENIZERS.fullmatch(entry.name) and entry.is_dir():
                    self._take_directory(entry)
                else:
                    self._take(entry)
            if CARD in self.digests:
                with open(self.path / CARD, "rb") as file:
                    self.card = file.read(CARD_BYTES)
        except OSError as error:
            raise WorkError(
                f"cannot store a copy of the small files of {directory}: {error.strerror}: set TMPDIR elsewhere"
            ) from None

    def release(self) -> None:
        """Remove the copy; `digests` and `left_out` stay."""
        self._scratch = None

    @contextmanager
    def named_as_given(self) -> Iterator[None]:
        """Let an InputError of the context name the model's directory where it names the copy."""
        try:
            yield
        except InputError as error:
            raise InputError(str(error).replace(one_line(self.path), one_line(self.directory))) from None

    def published(self) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each file that may be published: all but config.json.

        JSON files come without paths of this machine, which trainers and tokenizers write into theirs.
        """
        paths = paths_of_this_machine(self.directory)
        for name in self.digests:
            if name != "config.json":
                data = read_limited(self.path / name, LARGEST_READ, self.path)
                yield name, json_without_paths(data, paths) if name.endswith(".json") else data

    @property
    def left_out_line(self) -> str | None:
        """One line on what is left out of the result; None where nothing is."""
        if not self.left_out:
            return None
        named = [f"{one_line(name, 80)} ({why})" for name, why in list(self.left_out.items())[:_NAMED]]
        rest = len(self.left_out) - len(named)
        return f"left out of the result: {', '.join(named)}{f' and {rest} more' if rest else ''}"

    def _take_directory(self, directory: Path) -> None:
        if self.directory.resolve() not in directory.resolve().parents:
            self.left_out[directory.name] = "leads out of the directory"
            return
        check_files(directory, self.directory)
        (self.path / directory.name).mkdir()
        for entry in entries_of(directory):
            self._take(entry)

    def _take(self, entry: Path) -> None:
        """Copy one file, or note why it is left out. Of hidden files, weights and indexes nothing is noted."""
        name = entry.relative_to(self.directory).as_posix()
        if entry.name.startswith(".") or name.endswith(".index.json"):
            return
        why = _kind_left_out(entry.name)
        if why is None:
            if _WEIGHTS.fullmatch(entry.name):
                if entry.parent != self.directory:
                    self.left_out[name] = "weights"
                return
            why = self._why_unusable(entry)
        if why is None:
            try:
                digest = copy_limited(entry, self.path / name, LARGEST_READ, self.directory)
            except InputError:
                if is_read(entry.name):
                    raise
                why = "cannot be read"
            else:
                with open(self.path / name, "rb") as file:
                    why = "can hold code" if _CODE_BEGINS.match(file.read(4)) else None
                self.digests[name] = digest
        if why is not None:
            self.left_out[name] = why
            self.digests.pop(name, None)
            (self.path / name).unlink(missing_ok=True)

    def _why_unusable(self, entry: Path) -> str | None:
        """Return why what `entry` is cannot be copied; None where it can.

        Raises InputError where all together is too large.
        """
        try:
            status = entry.stat()
        except OSError:
            return "a link to nothing"
        if stat.S_ISDIR(status.st_mode):
            return "a directory"
        if not stat.S_ISREG(status.st_mode):
            return "no file"
        if not stays_inside(entry, self.directory):
            return "leads out of the directory"
        if status.st_size > LARGEST_COPIED and not is_read(entry.name):
            return f"larger than {LARGEST_COPIED >> 20} MiB"
        self.total_bytes += status.st_size
        if self.total_bytes > LARGEST_TOTAL:
            raise InputError(
                f"the files beside the weights in {self.directory} are larger than {LARGEST_TOTAL >> 30} GiB together: "
                "take out what is not the model's"
            )
        return None


def _name_of(directory: Path) -> str:
    """Return the directory's name as it was given: transformers names the module of a model's own code by it."""
    return directory.name if directory.name not in ("", "..") else directory.resolve().name or "model"


def _kind_left_out(name: str) -> str | None:
    """Return why a file of this name is never copied; None for others."""
    if _ADAPTER.fullmatch(name):
        return "an adapter's"
    if _QUANTIZATION.fullmatch(name):
        return "another tool's quantization"
    return "can hold code" if _CODE.fullmatch(name) else None
