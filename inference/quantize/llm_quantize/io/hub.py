"""Model directories, local or fetched from the Hugging Face hub, and the hub's failures told in one line.

Knows no weights: what is inside the directory is `source.py`'s business. `huggingface_hub` is imported where
it is used, so that importing this module costs nothing.
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

# What a checkpoint is made of, besides weights that unpickling would run as code. Patterns match whole paths,
# so that `*.json` takes subdirectories too (additional chat templates live in one).
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
# The same weights once more: Meta's and Mistral's own layouts, and exports for other runtimes.
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


HUB_TIMEOUT = 5  # seconds until a hub that says nothing counts as out of reach


def looks_like_path(text: str) -> bool:
    """Whether `text` can only mean a place on disk: `./x`, `/x`, `~/x`, `a/b/c`, `x/`."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or "\\" in text or text.count("/") > 1


def local_model(model_path: str) -> Path | None:
    """The directory that `model_path` is, or None where it is a hub id. No network.

    Raises InputError: a file, a path without a directory, what is neither.
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
    """The directory that holds `model_path`: itself where it is one, else a snapshot of the hub's repository.

    `model_path` is a directory, `repo` or `repo@revision`. A snapshot that the cache already holds serves
    without a network. Python files come only with `trust_remote_code`; pickled weights only with
    `allow_pickle`, and then only where there are no safetensors.

    Raises InputError: no such directory or repository, gated, unreachable, no weights; WorkError: cache not
    writable, disk full.
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
    import huggingface_hub
    from huggingface_hub import utils

    quiet: Any = utils  # its names are not exported in the way that mypy wants
    quiet.logging.set_verbosity_error()  # what matters of its warnings comes back as an exception
    if not sys.stderr.isatty():
        quiet.disable_progress_bars()
    # Asked first and once: the download's own question has no time limit.
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
        reason = hub_reason(error, "model", repo, revision)
        if "no such model" in reason:
            reason = f"no such directory: {repo}, and {reason}"
        raise InputError(reason) from error


def hub_reason(error: BaseException, kind: str, repo: str, revision: str | None = None) -> str:
    """One line: why the hub did not give the `kind` ("model", "dataset") `repo`, and what to do.

    Reads the whole chain of exceptions, since `datasets` wraps those of `huggingface_hub`, which wraps those
    of httpx. Raises WorkError where the cause is the local disk.
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def first(*types: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, types)), None)

    login = "run `hf auth login` or set HF_TOKEN"
    for e in chain:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise WorkError(
                f"cannot store {repo} under {constants.HF_HOME}: {e.strerror}: set HF_HOME elsewhere"
            )
    # `datasets` keeps of a gated repository no more than this word.
    if first(errors.GatedRepoError) or (
        type(error).__name__ == "DatasetNotFoundError" and "gated" in str(error)
    ):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return f"{repo} is gated: accept its conditions at {page}, then {login}"
    if first(errors.RevisionNotFoundError):
        return f"{kind} {repo} has no revision '{revision}'"
    http = first(errors.HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", None)
    # 401 is also what the hub says of unknown names to whoever is not logged in.
    if first(errors.RepositoryNotFoundError) or status == 401:
        return f"the hub has no such {kind}: {repo} (if it is private, {login})"
    if http is not None:
        return f"the hub answered {status} for {kind} {repo}: {login if status == 403 else 'try again later'}"
    if first(errors.OfflineModeIsEnabled):
        return f"{kind} {repo} is not in the cache, and HF_HUB_OFFLINE forbids fetching it"
    network = [e for e in chain if isinstance(e, ConnectionError | TimeoutError) or _is_transport(e)]
    if network:
        return f"cannot reach the hub at {constants.ENDPOINT} for {kind} {repo} ({one_line(network[0])})"
    if first(errors.LocalEntryNotFoundError):
        return f"{kind} {repo} is not in the cache, or not all of it, and the hub cannot be reached"
    return f"cannot load {kind} {repo}: {one_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and, outermost first, all that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_transport(error: BaseException) -> bool:
    # By name: huggingface_hub 1.x talks through httpx, 2.x through httpx2, and the two share no class.
    return any(
        c.__name__ == "TransportError" and c.__module__.startswith("httpx") for c in type(error).__mro__
    )
