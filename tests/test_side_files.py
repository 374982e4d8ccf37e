"""Test what is taken from beside the weights: as it was at the start, only from the directory, nothing that runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from llm_quantize.errors import InputError, WorkError
from llm_quantize.io import untrusted
from llm_quantize.model import side_files
from llm_quantize.model.side_files import SideFiles
from llm_quantize.model.source import SourceModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a directory with a config.json alone; nothing here looks into it."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"a": 1}')
    return directory


def put(directory: Path, name: str, data: bytes = b"text") -> Path:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# --- what is copied -------------------------------------------------------------------------------------------


def test_files_are_published_as_they_are(model: Path) -> None:
    files = {
        "tokenizer.json": b'{"model": {}}',
        "tokenizer.model": b"\x0a\x0e\x0a\x05<unk>",
        "merges.txt": b"a b\n",
        "generation_config.json": b'{ "x":1}',
        "LICENSE": b"\xff\xfe no UTF-8",
        "README.md": b"# A card",
        "picture.png": b"\x89PNG",
        "modeling_own.py": b"import os\n",
        "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
        "tokenizer/spiece.model": b"\x0a",
        "own_tokenizer/merges.txt": b"a b\n",
    }
    for name, data in files.items():
        put(model, name, data)
    found = SideFiles(model)
    assert dict(found.published()) == files
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in files.items()}
    assert found.digests == digests | {"config.json": xxhash.xxh3_128_hexdigest(b'{"a": 1}')}
    assert found.total_bytes == sum(map(len, files.values())) + 8
    assert found.card == b"# A card"
    assert (found.left_out, found.left_out_line) == ({}, None)


def test_weights_indexes_and_hidden_files_are_not_noted(model: Path) -> None:
    for name in (
        "model.safetensors",
        "pytorch_model.bin",
        "x.gguf",
        "model.safetensors.index.json",
        ".DS_Store",
    ):
        put(model, name)
    (model / ".git").mkdir()
    found = SideFiles(model)
    assert list(found.published()) == []
    assert found.left_out == {}


CODE = [
    "a.pkl",
    "a.PICKLE",
    "vectorizer.joblib",
    "state.dill",
    "regression.sav",
    "speech.nemo",
    "model.pdparams",
    "model.pdiparams",
    "scaler.pkl.gz",
    "scaler.joblib.z",
    "values.npy",
    "values.npz",
    "own.so",
    "module.pyc",
    "code.zip",
    "code.tar.gz",
    "package.whl",
    "model.llamafile",
]
QUANTIZATION = [
    "hf_quant_config.json",
    "quant_config.json",
    "quantize_config.json",
    "quantization_config.json",
    "compression_config.json",
    "quant_log.csv",
    "quantization_args.json",
    "recipe.yaml",
    "quanto_qmap.json",
    "imatrix.dat",
]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
KINDS = {
    "can hold code": CODE,
    "another tool's quantization": QUANTIZATION,
    "an adapter's": ADAPTER,
}


@pytest.mark.parametrize(("why", "name"), [(why, name) for why, names in KINDS.items() for name in names])
@pytest.mark.parametrize("folder", ["", "additional_chat_templates/"])
def test_kinds_that_are_never_copied(why: str, name: str, folder: str, model: Path) -> None:
    put(model, folder + name)
    found = SideFiles(model)
    assert list(found.published()) == []
    assert found.left_out == {folder + name: why}
    assert f"{name} ({why})" in str(found.left_out_line)


@pytest.mark.parametrize(
    "data", [*(pickle.dumps({}, protocol=p) for p in (2, 3, 4, 5)), b"PK\x03\x04 a zip", b"\x7fELF"]
)
@pytest.mark.parametrize("name", ["vocabulary", "tokenizer.model", "cache.dat"])
def test_a_pickle_by_another_name_is_not_copied(data: bytes, name: str, model: Path) -> None:
    put(model, name, data)
    found = SideFiles(model)
    assert list(found.published()) == []
    assert found.left_out == {name: "can hold code"}
    assert name not in found.digests
    assert not (found.path / name).exists()


def test_names_that_only_look_like_those(model: Path) -> None:
    names = [
        "quantum.txt",
        "adapter.txt",
        "peft.json",
        "sow.py",
        "LICENSE.zipcode",
        "recipes.yaml.md",
        "config_quant.txt",
    ]
    for name in names:
        put(model, name)
    assert sorted(SideFiles(model).digests) == sorted([*names, "config.json"])


def test_other_directories_are_named(model: Path) -> None:
    put(model, "onnx/model.onnx")
    put(model, "runs/events")
    put(model, "speech_tokenizer/model.safetensors")
    found = SideFiles(model)
    assert found.left_out == {
        "onnx": "a directory",
        "runs": "a directory",
        "speech_tokenizer/model.safetensors": "weights",
    }


def test_the_line_on_what_is_left_out_stays_short(model: Path) -> None:
    for number in range(30):
        put(model, f"{number:02d}\n\x1b[31m.pkl")
    line = str(SideFiles(model).left_out_line)
    assert line.endswith("and 18 more")
    assert line.isprintable()


# --- nothing from elsewhere, nothing without end ------------------------------------------------------------------

READ = ["README.md", "chat_template.jinja", "vocab.txt", "additional_chat_templates/tool_use.jinja"]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("target", ["a file", "relative", "a chain"])
def test_a_link_that_leads_out_is_refused(name: str, target: str, model: Path, tmp_path: Path) -> None:
    secret = put(tmp_path, "secret", b"a private key")
    link = put(model, name)
    link.unlink()
    if target == "a chain":
        (model / "hop.jinja").symlink_to(secret)
    place: dict[str, str | Path] = {
        "a file": secret,
        "relative": os.path.relpath(secret, link.parent),
        "a chain": model / "hop.jinja",
    }
    link.symlink_to(place[target])
    with pytest.raises(InputError, match=r"is a link that leads out of it: put a copy in its place"):
        SideFiles(model)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_pipe_or_a_device_is_refused(name: str, kind: str, model: Path) -> None:
    path = put(model, name)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"is neither a file nor a directory: remove it"):
        SideFiles(model)


@pytest.mark.parametrize("name", READ)
def test_a_huge_file_is_refused(name: str, model: Path) -> None:
    os.truncate(put(model, name), (512 << 20) + 1)  # of zeros that take no disk
    with pytest.raises(InputError, match=r"is larger than 512 MiB"):
        SideFiles(model)


def test_a_file_that_no_reader_needs_is_left_out(model: Path, tmp_path: Path) -> None:
    put(tmp_path, "secret", b"a private key")
    (model / "NOTICE").symlink_to("../secret")
    (model / "AUTHORS").symlink_to("nowhere")
    os.mkfifo(model / "LICENSE")
    os.truncate(put(model, "film.mp4"), (64 << 20) + 1)
    found = SideFiles(model)
    assert found.left_out == {
        "NOTICE": "leads out of the directory",
        "AUTHORS": "a link to nothing",
        "LICENSE": "no file",
        "film.mp4": "larger than 64 MiB",
    }
    assert list(found.published()) == []


def test_a_directory_of_templates_that_leads_out_is_left_out(model: Path, tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/tool_use.jinja", b"a private key")
    (model / "additional_chat_templates").symlink_to("../elsewhere")
    (model / "tokenizer").symlink_to(".")
    found = SideFiles(model)
    assert found.left_out["additional_chat_templates"] == "leads out of the directory"
    assert found.left_out["tokenizer"] == "leads out of the directory"
    assert list(found.published()) == []


def test_links_inside_and_into_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(("config.json", "README.md", "additional_chat_templates/tool_use.jinja")):
        (blobs / str(number)).write_text(f"{{}} {name}")
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (snapshot / "CARD.md").symlink_to("README.md")
    found = dict(SideFiles(snapshot).published())
    assert found == {
        "README.md": b"{} README.md",
        "CARD.md": b"{} README.md",
        "additional_chat_templates/tool_use.jinja": b"{} additional_chat_templates/tool_use.jinja",
    }


def test_all_together_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "LARGEST_TOTAL", 1 << 20)
    for number in range(3):
        put(model, f"{number}.txt", b"x" * 400_000)
    with pytest.raises(
        InputError, match=r"the files beside the weights in .* are larger than 0 GiB together"
    ):
        SideFiles(model)


def test_a_file_that_is_changed_between_check_and_reading(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened is checked again, so a link that is put there later leads nowhere."""
    secret = put(tmp_path, "secret", b"a private key")
    put(model, "README.md")
    check = untrusted.check_files

    def swapping(directory: Path, inside: Path | None = None) -> None:
        check(directory, inside)
        (model / "README.md").unlink()
        (model / "README.md").symlink_to(secret)

    monkeypatch.setattr(side_files, "check_files", swapping)
    monkeypatch.setattr(side_files, "stays_inside", lambda path, inside=None: True)
    with pytest.raises(InputError, match=r"README\.md is a link that leads out"):
        SideFiles(model)


def test_a_file_that_grows_while_it_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(model, "README.md", b"x" * 100)
    monkeypatch.setattr(side_files, "LARGEST_READ", 150)
    opened = untrusted.open_guarded

    def growing(*args: object) -> object:
        file = opened(*args)  # type: ignore[arg-type]
        path.write_bytes(b"x" * 200)
        return file

    monkeypatch.setattr(untrusted, "open_guarded", growing)
    with pytest.raises(InputError, match=r"config\.json is larger|README\.md is larger"):
        SideFiles(model)


# --- as it was at the start ---------------------------------------------------------------------------------------


def test_what_changes_later_changes_nothing(saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    put(directory, "NOTICE", b"of the start")
    model = SourceModel.open(directory)
    before = dict(model.side_files.published())
    (directory / "tokenizer.json").unlink()
    (directory / "NOTICE").write_text("of later")
    put(directory, "LICENSE", b"of later")
    assert dict(model.side_files.published()) == before
    assert before["NOTICE"] == b"of the start"
    assert "tokenizer.json" in before


def test_the_copy_goes_when_it_is_released(model: Path) -> None:
    put(model, "README.md", b"# A card")
    found = SideFiles(model)
    assert found.path.name == "model"
    assert found.path.is_dir()
    found.release()
    assert not found.path.exists()
    assert found.card == b"# A card"


def test_the_copy_is_not_named_in_errors(saved: Callable[[str], Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    for name in ("tokenizer.json", "config.json"):
        (directory / name).write_text("{}")
        with pytest.raises(InputError) as caught:
            SourceModel.open(directory)
        assert "llm-quantize-" not in str(caught.value), name


def test_no_room_for_the_copy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(side_files, "copy_limited", full)
    with pytest.raises(
        WorkError, match=r"cannot store a copy of the small files of .*: No space left on device: set TMPDIR"
    ):
        SideFiles(model)


def test_json_files_come_without_paths_of_this_machine(model: Path) -> None:
    content = {
        "name_or_path": str(model / "x"),
        "url": f"file://{model}/y",
        str(model / "z"): 1,
        "other": "/etc",
    }
    put(model, "special_tokens_map.json", json.dumps(content).encode())
    put(model, "additional_chat_templates/a.json", json.dumps(content).encode())
    for name, data in SideFiles(model).published():
        assert json.loads(data) == {"name_or_path": "x", "url": "y", "z": 1, "other": "/etc"}, name
