"""Find model directories, local or on the Hugging Face hub, and describe failures of the hub in one line.

This module does not look into the files of a model. `huggingface_hub` is imported only where it is used, so that
importing this module is fast.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_quantize.errors import InputError, WorkError, one_line

REPO_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)

# The files of a checkpoint, except pickled weights, which can run code when they are loaded. A pattern matches the
# whole path, so `*.json` matches in subdirectories too (additional chat templates are in one).
FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth")
# Copies of the same weights: Meta's and Mistral's own formats, and exports for other runtimes.
DUPLICATES = (
    "original/*",
    "consolidated*",
    "onnx/*",
    "openvino/*",
    "*/*.safetensors",
    "*/*.bin",
    "*/*.pt",
    "*/*.pth",
)

HUB_TIMEOUT = 5  # seconds without an answer until the hub counts as unreachable


class NoSuchRepositoryError(InputError):
    """The hub has no repository of this name, or hides it from users who are not logged in."""


def looks_like_path(text: str) -> bool:
    """Return whether `text` can only be a path on disk: `./x`, `/x`, `~/x`, `a/b/c`, `x/`."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or "\\" in text or text.count("/") > 1


def local_model(model_path: str) -> Path | None:
    """Return the local directory that `model_path` names, or None where it is a hub id. Uses no network.

    Raises InputError: it is a file, a path where nothing is, or neither a path nor a hub id.
    """
    try:
        path = Path(model_path).expanduser()
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user without a home
        raise InputError(f"cannot look for {model_path}: {one_line(error)}") from None
    if there:
        raise InputError(f"{model_path} is a file: give the model's directory, or a hub id")
    if looks_like_path(model_path) or not REPO_ID.fullmatch(model_path.partition("@")[0]):
        raise InputError(
            f"no such directory: {model_path} (and it is not a hub id like Qwen/Qwen2.5-7B-Instruct)"
        )
    return None


def resolve_model(
    model_path: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    log: Callable[[str], None],
) -> Path:
    """Return the directory of a model: `model_path` itself if it is one, else a snapshot from the hub.

    model_path: a directory, `repo` or `repo@revision`. A snapshot in the cache needs no network.
    trust_remote_code: fetch Python files, too.
    allow_pickle: fetch pickled weights where there are no safetensors.
    log: is called with each note, one line.

    Raises InputError: no such directory or repository, gated, unreachable, no weights. Raises WorkError: the cache
    is not writable, or the disk is full.
    """
    if (path := local_model(model_path)) is not None:
        return path
    repo, _, revision = model_path.partition("@")
    log(f"fetching {model_path} from the hub, or from its cache")
    allow = [*FILES, *(["*.py"] if trust_remote_code else [])]
    snapshot = _snapshot(repo, revision or None, allow)
    if any(snapshot.glob("*.safetensors")):
        return snapshot
    if not allow_pickle:
        raise InputError(
            f"{model_path} has no safetensors weights: pickled ones (.bin, .pt) are read only with "
            "--allow_pickle, if you trust their author"
        )
    snapshot = _snapshot(repo, revision or None, [*allow, *PICKLES])
    if not any(file for pattern in PICKLES for file in snapshot.glob(pattern)):
        raise InputError(
            f"{model_path} has no weights, neither safetensors nor pickled: choose another model"
        )
    log(f"{model_path} has pickled weights only: fetched as --allow_pickle says")
    return snapshot


def _snapshot(repo: str, revision: str | None, allow: list[str]) -> Path:
    """Download the files that match `allow`, or take them from the cache; return their directory."""
    import huggingface_hub
    from huggingface_hub import utils

    quiet: Any = utils  # its names are not exported in the way that mypy wants
    quiet.logging.set_verbosity_error()  # its important warnings come as exceptions, too
    if not sys.stderr.isatty():
        quiet.disable_progress_bars()
    # Ask the hub first, once: the request of `snapshot_download` has no time limit.
    refusal: Exception | None = None
    try:
        huggingface_hub.HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT)
    except Exception as error:
        refusal = error
    try:
        try:
            if isinstance(refusal, huggingface_hub.errors.RevisionNotFoundError):
                raise refusal
            return Path(
                huggingface_hub.snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=allow,
                    ignore_patterns=list(DUPLICATES),
                    local_files_only=refusal is not None,
                )
            )
        except huggingface_hub.errors.LocalEntryNotFoundError:
            raise refusal or RuntimeError("the download left nothing in the cache") from None
    except Exception as error:
        failure = hub_error(error, "model", repo, revision)
        if isinstance(failure, NoSuchRepositoryError):
            raise InputError(f"no such directory: {repo}, and {failure}") from error
        raise failure from error


def hub_error(
    error: BaseException, kind: str, repo: str, revision: str | None = None
) -> InputError | WorkError:
    """Return an error of one line that says why the hub did not give `repo`, and what to do.

    error: what a library raised. Its whole chain of causes is read, because `datasets` wraps the exceptions of
    `huggingface_hub`, which wraps those of httpx.
    kind: "model" or "dataset".

    Returns a WorkError where the local disk is the cause, NoSuchRepositoryError where the hub has no such
    repository, else another InputError.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def first(*types: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, types)), None)

    login = "run `hf auth login` or set HF_TOKEN"
    for e in chain:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            return WorkError(
                f"cannot store {repo} under {constants.HF_HOME}: {e.strerror}: set HF_HOME elsewhere"
            )
    # `datasets` tells a gated repository from a missing one only by this word in the message.
    if first(errors.GatedRepoError) or (
        type(error).__name__ == "DatasetNotFoundError" and "gated" in str(error)
    ):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return InputError(f"{repo} is gated: accept its conditions at {page}, then {login}")
    if first(errors.RevisionNotFoundError):
        return InputError(f"{kind} {repo} has no revision '{revision}'")
    http = first(errors.HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", None)
    # To users who are not logged in, the hub also answers 401 for unknown names.
    if first(errors.RepositoryNotFoundError) or status == 401:
        return NoSuchRepositoryError(f"the hub has no such {kind}: {repo} (if it is private, {login})")
    if http is not None:
        remedy = login if status == 403 else "try again later"
        return InputError(f"the hub answered {status} for {kind} {repo}: {remedy}")
    if first(errors.OfflineModeIsEnabled):
        return InputError(f"{kind} {repo} is not in the cache, and HF_HUB_OFFLINE forbids fetching it")
    network = [e for e in chain if isinstance(e, ConnectionError | TimeoutError) or _is_transport(e)]
    if network:
        return InputError(
            f"cannot reach the hub at {constants.ENDPOINT} for {kind} {repo} ({one_line(network[0])})"
        )
    if first(errors.LocalEntryNotFoundError):
        return InputError(
            f"{kind} {repo} is not in the cache, or not all of it, and the hub cannot be reached"
        )
    return InputError(f"cannot load {kind} {repo}: {one_line(error)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and all exceptions that led to it, the latest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_transport(error: BaseException) -> bool:
    # By name: huggingface_hub 1.x uses httpx, 2.x uses httpx2, and the two have no common class.
    return any(
        c.__name__ == "TransportError" and c.__module__.startswith("httpx") for c in type(error).__mro__
    )
