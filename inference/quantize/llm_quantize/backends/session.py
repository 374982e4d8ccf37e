"""Runs a library's quantizer in an environment of its own: the parent's half of what `scripts/child.py` describes.

The job goes over as files, progress comes back as lines. uv makes an environment from the pins in the script; the first
time it downloads some gigabytes. Knows nothing of what is published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_quantize.backends.registry import Library
from llm_quantize.backends.scripts.child import Job as Job  # callers take it from here
from llm_quantize.console import Blocks, Console
from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.json_text import as_json
from llm_quantize.io.untrusted import read_json
from llm_quantize.model.config_file import with_old_rope_keys
from llm_quantize.model.source import SourceModel

SCRIPTS = Path(__file__).resolve().parent / "scripts"
COMMAND = ("uv", "run", "--script")
_LONG = 300  # characters of an error that are shown
_PATIENCE = 10.0  # seconds that a process has to end in
# What a user's shell may hold that would reach into the other environment.
_DROPPED = re.compile(r"PYTHON.*|VIRTUAL_ENV|CONDA_.*|UV_PROJECT.*|UV_PYTHON")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the library took: seconds by stage (load, quantize, save), and bytes at most on the device and in memory."""

    seconds: dict[str, float]
    device_bytes: int
    host_bytes: int


class Session:
    """Context manager: a library imported and waiting in a process of its own; `quantize` sets it to work, once.

    Entering makes the environment where it is not there yet. `versions`: of the distributions that matter. Errors:
    `InputError` on entering (no uv, nothing to install from, a library that does not import), `WorkError` after.
    """

    def __init__(self, library: Library, device: torch.device, console: Console) -> None:
        self.library = library
        self.versions: dict[str, str] = {}
        self._device = device
        self._console = console
        self._process: subprocess.Popen[str] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._log: Path | None = None
        self._keep = False

    def __enter__(self) -> Self:
        program = shutil.which(COMMAND[0])
        if program is None:
            raise InputError(
                f"--backend needs uv to make an environment for {self.library.title}: install it "
                "(python3 -m pip install uv), or take --backend native"
            )
        self._console.note(
            f"{self.library.title} in an environment of its own (some gigabytes of downloads the first time)"
        )
        self._scratch = tempfile.TemporaryDirectory(prefix="llm-quantize-")
        handle, name = tempfile.mkstemp(prefix=f"llm-quantize-{self.library.distribution}-", suffix=".log")
        self._log = Path(name)
        try:
            with os.fdopen(handle, "w") as log:
                self._process = subprocess.Popen(
                    [program, *COMMAND[1:], str(SCRIPTS / self.library.script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    errors="replace",
                    cwd=self._scratch.name,
                    env=environment(os.environ, self._device),
                    start_new_session=True,
                )
            self._wait_until_ready()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    # -- the conversation

    def _events(self) -> Iterator[dict[str, Any]]:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # not the child's: uv, or a program that it starts
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event

    def _wait_until_ready(self) -> None:
        for event in self._events():
            if event["event"] == "ready":
                self.versions = {str(k): str(v) for k, v in event["versions"].items()}
                return
            if event["event"] in ("failed", "refused"):
                raise InputError(f"{self.library.title} cannot be used here: {self._explained(event)}")
        raise InputError(
            f"no environment for {self.library.title} ({self._last_words()}): the first time needs a package "
            f"index within reach; all of it is in {self._keep_log()}"
        )

    def quantize(self, job: Job, progress: Blocks) -> Outcome:
        """Has `job` done and shows how far it is. Errors: `WorkError` naming the library and its log."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._scratch is not None
        file = Path(self._scratch.name) / "job.json"
        file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        with suppress(OSError):  # a process that is gone is told of below
            self._process.stdin.write(f"{file}\n")
            self._process.stdin.flush()
        for event in self._events():
            match event["event"]:
                case "block":
                    for _ in range(min(event["done"], progress.total) - progress.done):
                        progress.advance()
                case "step":
                    progress.step(f"{self.library.name}: {event['text']}")
                case "refused":
                    raise InputError(f"{self.library.title}: {one_line(event['text'])[:_LONG]}")
                case "failed":
                    raise WorkError(f"{self.library.title} failed: {self._explained(event)}")
                case "done":
                    seconds = {str(k): float(v) for k, v in event["seconds"].items()}
                    return Outcome(seconds, int(event["device_bytes"]), int(event["host_bytes"]))
        code = self._process.wait()
        why = "killed, out of memory perhaps" if code in (-9, 137) else self._last_words()
        raise WorkError(f"{self.library.title} ended without a result ({why}): see {self._keep_log()}")

    def windows(self, tokens: Tensor) -> Path:
        """A file of `tokens`, int64 (n, length), for the job."""
        assert self._scratch is not None
        file = Path(self._scratch.name) / "windows.safetensors"
        save_file({"tokens": tokens.contiguous()}, file)
        return file

    def model(self, source: SourceModel, *, trust: bool) -> Path:
        """A directory of the files of `source`, as this library is to see them: links to weights, and side files.

        The model's own code stays out unless `trust`: AutoGPTQ runs what `auto_map` names without being told to. An
        older library gets an older config.json.
        """
        assert self._scratch is not None
        view = Path(self._scratch.name) / "model"
        shutil.copytree(
            source.side_files.path, view, ignore=None if trust else shutil.ignore_patterns("*.py")
        )
        weights = set(source.store.files.values())
        for path in weights:
            (view / path.name).symlink_to(path.resolve())
        if {path.name for path in weights} != {"model.safetensors"}:
            weight_map = {name: path.name for name, path in source.store.files.items()}
            _write_json(view / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        for name in ("config.json", "tokenizer_config.json"):
            if not (view / name).exists():
                continue
            content = read_json(view / name)
            if not trust:
                content.pop("auto_map", None)
            if name == "config.json" and self.library.old_reader:
                content = older_config(content, self.library.title)
            _write_json(view / name, content)
        return view

    # -- errors and the end

    def _explained(self, event: Mapping[str, Any]) -> str:
        kind, text = str(event.get("error", "")), one_line(event.get("text", ""))
        if kind == "OutOfMemoryError":
            text = "the GPU is out of memory: free it, or lower --calib_seq_len or --calib_samples"
        elif kind == "MemoryError":
            text = "out of memory: lower --calib_samples or --calib_seq_len"
        else:
            text = f"{kind}: {text}"[:_LONG]
        return f"{text}; see {self._keep_log()}"

    def _last_words(self) -> str:
        """The line of the log that says most: the last one that uv marks as an error, or the last one there is."""
        assert self._log is not None
        lines = [
            line.strip() for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        lines = [line for line in lines if line]
        marked = [re.sub(r"^(error:|×)\s*", "", line) for line in lines if line.startswith(("error:", "×"))]
        return one_line((marked or lines or ["it said nothing"])[-1])[:_LONG]

    def _keep_log(self) -> Path:
        assert self._log is not None
        self._keep = True
        return self._log

    def _close(self) -> None:
        """Ends the process, and everything that it started; the log stays where an error has named it."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            with suppress(OSError):
                self._process.stdin.close()  # a child that works or waits leaves with this
            _end(self._process)
            self._process.stdout.close()
            self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
        if self._log is not None and not self._keep:
            self._log.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(as_json(content), encoding="utf-8")


def _end(process: subprocess.Popen[str]) -> None:
    for sign in (None, signal.SIGTERM, signal.SIGKILL):
        if sign is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)  # uv and what it runs: the process leads a session of its own
        try:
            process.wait(_PATIENCE)
            return
        except subprocess.TimeoutExpired:
            continue


def environment(outer: Mapping[str, str], device: torch.device) -> dict[str, str]:
    """The child's environment variables: the caller's but for those of its Python, and `device` the only one seen."""
    env = {name: value for name, value in outer.items() if not _DROPPED.fullmatch(name)}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1"}
    if device.type == "cuda":
        seen = [name for name in outer.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        env["CUDA_VISIBLE_DEVICES"] = seen[index] if index < len(seen) else str(index)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than all the rest
    if len(os.sched_getaffinity(0)) <= 2:
        env.setdefault(
            "GPTQMODEL_CPU_WORKERS", "2"
        )  # GPTQModel 7.7.0 takes one on so small a machine, and fails
    return env


def older_config(config: dict[str, Any], title: str) -> dict[str, Any]:
    """A config.json that transformers 4 reads as transformers 5 does: rotary embeddings under their old keys.

    It would ignore `rope_parameters` and take its default base in silence. Errors: `InputError`, in the name of
    `title`, for parameters that have no old form.
    """
    result = with_old_rope_keys(config)
    if config.get("rope_parameters") and not {"rope_theta", "rotary_emb_base"} & result.keys():
        raise InputError(
            f"{title} cannot read this model's rotary embeddings (rope_parameters): take --backend native"
        )
    return result
