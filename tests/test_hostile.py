"""Test untrusted models: none of their code runs, nothing outside their directory is read, no size is believed."""

from __future__ import annotations

import getpass
import gzip
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MAIN
from llm_quantize.calibration import column_tokenizer, saved_datasets, text_files, text_sources
from llm_quantize.calibration.saved_datasets import quiet
from llm_quantize.calibration.windows import CalibrationConfig, load_windows
from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.errors import InputError
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_MODEL
from llm_quantize.io.hub import resolve_model
from llm_quantize.io.machine_paths import without_paths
from llm_quantize.io.untrusted import read_limited
from llm_quantize.model.allocation_limit import AllocationLimit, TooLarge
from llm_quantize.model.model_forward import embed
from llm_quantize.model.pickled_weights import convert_pickles
from llm_quantize.model.source import SourceModel
from llm_quantize.model.weight_files import tensor_files
from llm_quantize.serving import checkpoint_files
from llm_quantize.serving.cli import main as serving_main
from llm_quantize.serving.refusal import Refusal
from models import CPU

QUICK = ["--calib_samples", "2", "--calib_seq_len", "32", "--eval_data", "off", "--device", "cpu"]
QUICK += ["--group_size", "32", "--quality", "fast"]


@pytest.fixture
def model(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """Make a copy of a small model, which the tests make hostile."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def refused(directory: Path, words: str = ".", kind: type[Exception] = InputError) -> None:
    with pytest.raises(kind, match=words) as caught:
        SourceModel.open(directory)
    assert "\n" not in str(caught.value)


# --- code -----------------------------------------------------------------------------------------------------


class Marker:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the path of a file that exists only if code of the model has run."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path / "ran"


def with_code(model: Path, mark: Path) -> None:
    """Put code everywhere where transformers looks for some; importing it makes the file `mark`."""
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(
            f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): config_class = Config\n"
            "class Tokens(PreTrainedTokenizerFast): pass\n"
        )
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.Tokens"]})
    edit(model / "generation_config.json", custom_generate="custom_generate")


def test_code_of_a_model_is_not_run(model: Path, mark: Path) -> None:
    """transformers' own class reads a type that it knows, whatever code the model has."""
    with_code(model, mark)
    source = SourceModel.open(model)
    assert type(source.config).__module__.startswith("transformers.")
    assert type(source.skeleton).__module__.startswith("transformers.")
    assert not mark.exists()
    target = mark.parent / "out"
    words = ["--model_path", str(model), "--output_path", str(target), *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(EMBEDDED_CALIBRATION)]) == 0
    assert not mark.exists()


def test_the_flag_runs_it(model: Path, mark: Path) -> None:
    """So the other tests would notice code that runs."""
    with_code(model, mark)
    assert type(SourceModel.open(model, trust_remote_code=True).skeleton).__name__ == "Model"
    assert mark.exists()


@pytest.mark.parametrize("reference", ["evil.Config", "other/repository--evil.Config"])
def test_a_type_of_its_own_needs_the_flag(model: Path, mark: Path, reference: str) -> None:
    with_code(model, mark)
    edit(model / "config.json", model_type="evil", auto_map={"AutoConfig": reference})
    refused(model, "its own code.*--trust_remote_code")
    assert not mark.exists()


def test_a_tokenizer_of_its_own_needs_the_flag(model: Path, mark: Path) -> None:
    with_code(model, mark)
    (model / "tokenizer.json").unlink()
    edit(model / "tokenizer_config.json", tokenizer_class="Tokens")
    refused(model, "no usable tokenizer")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_no_kernel_of_the_hub_by_a_name_in_the_config(model: Path, key: str) -> None:
    edit(model / "config.json", **{key: "evil/kernel"})
    assert SourceModel.open(model).config._attn_implementation == "sdpa"


def test_a_chat_template_cannot_reach_python(model: Path, mark: Path) -> None:
    resume = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    importing = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    data = mark.parent / "chat.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "some words"}]}))
    for template in (resume, importing, "{{ messages.__class__.__base__ }}", "{% include '/etc/hostname' %}"):
        (model / "chat_template.jinja").write_text(template)
        words = ["--model_path", str(model), "--output_path", str(mark.parent / "out"), *QUICK]
        assert MAIN["gptq"]([*words, "--calib_data", str(data)]) == 2, template
    assert not mark.exists()


# --- pickles --------------------------------------------------------------------------------------------------

PICKLES = (
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "tokenizer.pkl",
    "vocab.pickle",
    "x.pth",
    "a.npy",
)


def test_no_pickle_is_read_or_handed_on(model: Path, mark: Path, tmp_path: Path) -> None:
    for name in PICKLES:
        (model / name).write_bytes(pickle.dumps({"weights": Marker(mark)}))
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(EMBEDDED_CALIBRATION)]) == 0
    assert not mark.exists()
    assert not set(PICKLES) & {p.name for p in (tmp_path / "out").iterdir()}
    pickle.loads((model / PICKLES[0]).read_bytes())
    assert mark.exists()  # it would have


@pytest.mark.parametrize("content", [{"x": 1}, [1], 3, None])
def test_pickled_weights(model: Path, mark: Path, tmp_path: Path, content: Any) -> None:
    """Without the flag an error names them; with it only tensors are read."""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Marker(mark)}))
    refused(model, r"only pickle weights \(pytorch_model\.bin\).*--allow_pickle")
    with pytest.raises(InputError, match=r"cannot read pytorch_model\.bin without running its code"):
        convert_pickles(model, tmp_path / "converted")
    torch.save(content, model / "pytorch_model.bin")
    if not isinstance(content, dict):
        with pytest.raises(InputError, match="holds no weights by name"):
            convert_pickles(model, tmp_path / "converted")
    assert not mark.exists()


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


UNFOLDING: dict[str, tuple[Callable[[], Any], str]] = {
    "expanded": (lambda: zeros(1).expand(1 << 20, 1 << 20), "x in .* is expanded"),
    "expanded, of some size": (lambda: zeros(1000).expand(1000, 1000), "x in .* is expanded"),
    "overlapping": (lambda: zeros(1000).as_strided((500, 500), (1, 1)), "x in .* is expanded"),
    "sparse": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (1 << 20, 1 << 20)),
        "x in .* is sparse",
    ),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "x in .* is sparse"),
    "quantized": (
        lambda: torch.quantize_per_tensor(zeros(4), 0.1, 0, torch.qint8),
        "x in .* is no plain tensor",
    ),
    "on no device": (lambda: torch.empty(1 << 20, 1 << 20, device="meta"), "x in .* is no plain tensor"),
    "complex": (lambda: torch.zeros(4, dtype=torch.complex64), "x in .* is of torch.complex64"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of kinds of tensors that PyTorch is about to drop
@pytest.mark.parametrize("case", UNFOLDING)
def test_a_pickled_tensor_that_unfolds(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kilobyte must not become gigabytes."""
    make, message = UNFOLDING[case]
    (model / "model.safetensors").unlink()
    torch.save({"fine": zeros(4), "x": make()}, model / "pytorch_model.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=message):
        convert_pickles(model, tmp_path / "converted")
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), "--allow_pickle", *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(EMBEDDED_CALIBRATION)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


def test_a_pickled_tensor_under_many_names(model: Path, tmp_path: Path) -> None:
    """A tied head or layers that share weights are sound, a thousand names for the same bytes are not."""
    (model / "model.safetensors").unlink()
    shared = zeros(1000, 1000)
    torch.save({"embedding": shared, "head": shared, "part": shared[:10]}, model / "pytorch_model.bin")
    found = load_file(convert_pickles(model, tmp_path / "tied") / "model-00000.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "embedding": (1000, 1000),
        "head": (1000, 1000),
        "part": (10, 1000),
    }
    torch.save({f"name {i}": shared for i in range(1000)}, model / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds the same bytes under more than 4 names"):
        convert_pickles(model, tmp_path / "many")


def test_a_pickle_in_a_packed_archive(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"x": zeros(1 << 20)}, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(model / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert (model / "pytorch_model.bin").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a packed archive"):
        convert_pickles(model, tmp_path / "converted")


# --- a config that sends its reader elsewhere -----------------------------------------------------------------


@pytest.mark.parametrize("listed", [["config.4.0.0.json"], ["config.99.0.0.json"], [], None, "x", 3])
def test_a_config_cannot_name_another_config(listed: Any, model: Path) -> None:
    """transformers would read the other file, which nobody has checked."""
    other = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (model / "config.4.0.0.json").write_text(json.dumps(other))
    edit(model / "config.json", configuration_files=listed)
    refused(
        model,
        r"^config\.json sends its reader to other files \(configuration_files\): put the one that is meant",
    )


def test_another_config_without_the_key_is_not_read(model: Path) -> None:
    (model / "config.4.0.0.json").write_text("{}")
    assert SourceModel.open(model).config.num_hidden_layers == 2


@pytest.mark.parametrize("named", ["other.safetensors", "../x.safetensors", ["a"], 3, ""])
def test_a_config_cannot_name_other_weights(named: Any, model: Path) -> None:
    edit(model / "config.json", transformers_weights=named)
    refused(model, r"^config\.json names its weights \(transformers_weights: ")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [{"quant_method": "awq"}, {}, "awq", 3, ["gptq"]])
@pytest.mark.parametrize("inside", [None, "text_config", "llm_config", "language_config"])
def test_a_quantized_source_however_it_says_so(key: str, value: Any, inside: str | None, model: Path) -> None:
    edit(model / "config.json", **({key: value} if inside is None else {inside: {key: value}}))
    refused(model, "is already quantized")


@pytest.mark.parametrize(
    "name",
    [
        "{outside}",
        "../../../../../../../../..{outside}",
        "../tokenizer.0.0.1.json",
        "a/tokenizer.0.0.1.json",
        3,
    ],
)
def test_a_tokenizers_config_cannot_name_another_tokenizer(name: Any, model: Path, tmp_path: Path) -> None:
    """By `fast_tokenizer_files` transformers chooses among files of the directory, and of no other."""
    outside = shutil.copy(model / "tokenizer.json", tmp_path / "tokenizer.0.0.1.json")
    (model / "a").mkdir()
    shutil.copy(outside, model / "a")
    listed = [name.format(outside=outside) if isinstance(name, str) else name]
    edit(model / "tokenizer_config.json", fast_tokenizer_files=listed)
    refused(model, r"^tokenizer_config\.json names a file that is not beside it: ")


def test_a_tokenizers_config_may_name_one_of_its_directory(model: Path) -> None:
    before = SourceModel.open(model).tokenizer("some words")["input_ids"]
    (model / "tokenizer.json").rename(model / "tokenizer.0.0.1.json")
    (model / "tokenizer.json").write_text("{}")
    edit(model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.0.0.1.json"])
    assert SourceModel.open(model).tokenizer("some words")["input_ids"] == before


# --- files that are not the directory's own -------------------------------------------------------------------

READ = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.txt",
    "tokenizer.model",
    "evil.py",
)


@pytest.mark.parametrize("name", READ)
def test_a_link_that_leads_out_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    if (model / name).exists():
        (model / name).rename(tmp_path / name)
    else:
        (tmp_path / name).write_text("{}")
    for target in (str(tmp_path / name), f"../{name}"):
        (model / name).symlink_to(target)
        refused(model, rf"^{name} in .* is a link that leads out of it: put a copy in its place")
        (model / name).unlink()


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(model: Path, name: str, kind: str) -> None:
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero")
    refused(model, f"{name} in .* is neither a file nor a directory")


def test_links_inside_and_into_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "w.safetensors")
    (model / "model.safetensors").symlink_to("w.safetensors")
    SourceModel.open(model)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(p for p in model.iterdir() if not p.is_symlink()):
        shutil.copy(file, blobs / str(number))
        name = "model.safetensors" if file.name == "w.safetensors" else file.name
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    SourceModel.open(snapshot)
    # Blobs of another repository are not this one's.
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(model / "config.json", other / "1")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--c--d/blobs/1")
    refused(snapshot, "is a link that leads out")


SHARDS = ["../w.safetensors", "/w.safetensors", "sub/w.safetensors", "..", "", ".", "a\0.safetensors"]
SHARDS += ["w.safetensors/", "./w.safetensors", "..\\w.safetensors/../../w.safetensors"]


@pytest.mark.parametrize("shard", [*SHARDS, None, 3, ["w.safetensors"], {}])
def test_an_index_cannot_name_what_is_elsewhere(model: Path, tmp_path: Path, shard: Any) -> None:
    names = load_file(model / "model.safetensors")
    for place in (tmp_path, model / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copy(model / "model.safetensors", place / "w.safetensors")
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    refused(model)
    with pytest.raises(Refusal):
        checkpoint_files.read_tensors(model)


def test_an_index_cannot_lead_out_by_a_link(model: Path, tmp_path: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "w.safetensors")
    (model / "a.safetensors").symlink_to(tmp_path / "w.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    refused(model, "a.safetensors in .* is a link that leads out")
    with pytest.raises(InputError, match="a link that leads out"):
        tensor_files(model)  # as a quantized directory is read
    with pytest.raises(Refusal, match="a link that leads out"):
        checkpoint_files.read_tensors(model)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "merges_file", "chat_template_file"])
def test_a_tokenizers_config_cannot_name_what_is_elsewhere(model: Path, tmp_path: Path, key: str) -> None:
    before = SourceModel.open(model).tokenizer
    other = json.loads((model / "tokenizer.json").read_text())
    other["added_tokens"] = []
    other["model"]["vocab"] = {"secret": 0, "words": 1}
    other["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(other))
    edit(model / "tokenizer_config.json", **{key: str(tmp_path / "other.json")})
    found = SourceModel.open(model).tokenizer
    assert found("def secret(words):")["input_ids"] == before("def secret(words):")["input_ids"]
    assert found.chat_template == before.chat_template


@pytest.mark.parametrize("listed", ["../outside.json", "/tmp/outside.json", "a/../../outside.json"])
def test_a_hub_cannot_name_a_file_outside_its_cache(listed: str, tmp_path: Path) -> None:
    """A file that a repository lists is stored below the cache, or not at all."""
    script = (
        "import sys; import huggingface_hub as h\n"
        "from llm_quantize.errors import InputError\n"
        "from llm_quantize.io import hub\n"
        "from types import SimpleNamespace as N\n"
        "info = N(sha='c0ffee' + '0' * 34, siblings=[N(rfilename=sys.argv[1])])\n"
        "h.HfApi.model_info = h.HfApi.repo_info = lambda *a, **k: info\n"
        "h.HfApi.list_repo_tree = lambda *a, **k: [h.hf_api.RepoFile(path=sys.argv[1], size=2, oid='1' * 40)]\n"
        "try: hub.resolve_model('org/tiny', log=lambda line: None)\n"
        "except InputError as error: print(error)\n"
    )
    folder = str(Path(checkpoint_files.__file__).parents[2])
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PYTHONPATH": folder,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, listed],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert not [p for p in tmp_path.rglob("outside*") if (tmp_path / "home") not in p.parents]
    assert not Path("/tmp/outside.json").exists()


# --- sizes ----------------------------------------------------------------------------------------------------


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(start: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(text: bytes, data: int = 16, length: int | None = None) -> bytes:
    length = len(text) if length is None else length
    return (length % 2**64).to_bytes(8, "little") + text + bytes(data)


LIES: dict[str, bytes] = {
    "nothing": b"",
    "a length alone": b"\x10\0\0\0",
    "header longer than the file": file_of(header(a=entry(0, 8)), length=1000),
    "header of 2^63 bytes": file_of(header(a=entry(0, 8)), length=2**63),
    "header of -1 bytes": file_of(header(a=entry(0, 8)), length=-1),
    "header that ends early": file_of(header(a=entry(0, 8)), length=10),
    "no JSON": file_of(b"{not json"),
    "a list": file_of(b"[1, 2]"),
    "a number": file_of(b"3"),
    "deep": file_of(b"[" * 100_000),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a tensor that is a list": file_of(header(a=[1])),
    "no offsets": file_of(header(a={"dtype": "F32", "shape": [2]})),
    "offsets of one": file_of(header(a={"dtype": "F32", "shape": [2], "data_offsets": [0]})),
    "offsets that are words": file_of(header(a={"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]})),
    "offsets that are fractions": file_of(header(a={"dtype": "F32", "shape": [2], "data_offsets": [0.5, 8.5]})),
    "offsets beyond the end": file_of(header(a=entry(0, 80, (20,)))),
    "offsets far beyond the end": file_of(header(a=entry(0, 2**62, (2**60,)))),
    "negative offsets": file_of(header(a=entry(-8, 0))),
    "offsets backwards": file_of(header(a=entry(8, 0))),
    "a shape larger than its bytes": file_of(header(a=entry(0, 16, (2**40,)))),
    "a shape that overflows": file_of(header(a=entry(0, 16, (2**62, 2**62)))),
    "a negative shape": file_of(header(a=entry(0, 16, (-4,)))),
    "two negative sizes": file_of(header(a=entry(0, 16, (-2, -2)))),
    "a shape that is a word": file_of(header(a=entry(0, 16, "4"))),
    "an unknown type": file_of(header(a=entry(0, 16, (4,), "F33"))),
    "overlapping": file_of(header(a=entry(0, 12, (3,)), b=entry(8, 16))),
    "a hole": file_of(header(a=entry(0, 4, (1,)), b=entry(8, 16))),
    "bytes of nobody at the end": file_of(header(a=entry(0, 8))),
    "no bytes": file_of(header(a=entry(0, 16, (4,))), data=0),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(lie: str, model: Path) -> None:
    (model / "model.safetensors").write_bytes(LIES[lie])
    refused(model, "model.safetensors is damaged")
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = {"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, "a.safetensors is damaged")
    edit(model / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(InputError, match=r"a\.safetensors is damaged"):
        QuantizedStore(model)
    if lie != "an unknown type":  # left to vLLM, which reads with the library
        with pytest.raises(Refusal, match="is not a whole safetensors file"):
            checkpoint_files.read_tensors(model)


@pytest.mark.parametrize(
    "shape",
    [(0, 2**63), (2**63, 0), (0, 2**64 - 1), (0, 2**40, 2**40), (2**32, 0, 2**32), (1,) * 65, (0,) * 10_000],
    ids=str,
)
def test_a_shape_that_no_tensor_has(shape: tuple[int, ...], model: Path) -> None:
    """With a size of 0, or of 1 alone, its bytes are as many as the header says, and the library takes it."""
    count = 4 * int(0 not in shape)
    (model / "model.safetensors").write_bytes(file_of(header(a=entry(0, count, shape)), count))
    refused(
        model,
        r"model\.safetensors is damaged \(no tensor has a shape such as that of a\): download the model again",
    )


@pytest.mark.parametrize("count", [1, 2000])
def test_a_shape_of_numbers_without_end(count: int, model: Path) -> None:
    numbers = b"[" + b",".join([b"9" * 4000] * count) + b"]"
    (model / "model.safetensors").write_bytes(file_of(header(a=entry(0, 0, ())).replace(b"[]", numbers), 0))
    start = time.process_time()
    refused(model, "model.safetensors is damaged")
    assert time.process_time() - start < 5


def test_a_header_of_gigabytes_is_not_read(model: Path) -> None:
    """The file is as long as its header says, of zeros that take no disk."""
    path = model / "model.safetensors"
    with open(path, "wb") as file:
        file.write((4 << 30).to_bytes(8, "little"))
        file.truncate((4 << 30) + 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(model, "model.safetensors is damaged")
    with pytest.raises(Refusal, match="is not a whole safetensors file"):
        checkpoint_files.read_tensors(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


HUGE = 10**9
SIZES: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": HUGE, "layer_types": None},
    "layers, negative": {"num_hidden_layers": -HUGE},
    "no layers": {"num_hidden_layers": 0},
    "layers in words": {"num_hidden_layers": "many"},
    "layers by another name": {"n_layers": HUGE},
    "layers inside": {"text_config": {"num_hidden_layers": HUGE}},
    "layers far inside": {"a": [{"b": {"num_layers": HUGE}}]},
    "width": {"hidden_size": HUGE},
    "width, negative": {"hidden_size": -64},
    "no width": {"hidden_size": 0},
    "width in words": {"hidden_size": "64"},
    "MLP": {"intermediate_size": HUGE},
    "vocabulary": {"vocab_size": 10**12},
    "vocabulary, negative": {"vocab_size": -1},
    "vocabulary beyond integers": {"vocab_size": 10**40},
    "head": {"head_dim": HUGE},
    "heads": {"num_attention_heads": HUGE},
    "no heads": {"num_attention_heads": 0},
    "labels": {"num_labels": HUGE},
    "rope": {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}},
    "rope of a stranger": {"rope_parameters": {"rope_theta": 1, "rope_type": "evil"}},
    "an activation that is code": {"hidden_act": "__import__('os').system('true')"},
    "a type that is a path": {"model_type": "../../evil"},
    "a type that is a list": {"model_type": ["llama"]},
    "architectures of nothing": {"model_type": "", "architectures": []},
}


@pytest.mark.parametrize("case", SIZES)
def test_absurd_configs_are_refused_and_cost_nothing(case: str, model: Path) -> None:
    edit(model / "config.json", **SIZES[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


@pytest.mark.parametrize("length", [1 << 20, 1 << 18, 1 << 40])
def test_buffers_that_grow_with_the_square_of_a_number_in_the_config(length: int, model: Path) -> None:
    """GPT-BigCode keeps a mask of all pairs of positions."""
    from transformers import GPTBigCodeConfig

    config = GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=2048)
    config.architectures = ["GPTBigCodeForCausalLM"]
    (model / "config.json").write_text(config.to_json_string())
    edit(model / "config.json", n_positions=length)
    refused(model, "asks for a tensor of .* elements, more than all weights together hold")


def test_deep_and_endless_json(model: Path) -> None:
    config = model / "config.json"
    whole = config.read_text()
    for text in (
        '{"a":' * 5000 + "1" + "}" * 5000,
        '{"a": ' + "9" * 100_000 + "}",
        whole[:-1] + ', "b": ' + "[" * 900 + "]" * 900 + ', "num_hidden_layers": 1000000000}',
    ):
        config.write_text(text)
        refused(model)
    config.write_text(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before = (model / name).read_text()
        (model / name).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
        refused(model, "no usable tokenizer")
        (model / name).write_text(before)
    with open(model / "tokenizer.json", "wb") as file:
        file.truncate(513 << 20)
    refused(model, "tokenizer.json in .* is larger than 512 MiB")


def test_the_limit_is_asked_before_memory_is_taken() -> None:
    with AllocationLimit(1000, 100), pytest.raises(TooLarge, match="1,001 elements"):
        torch.ones(1001)
    with AllocationLimit(1000, 100), pytest.raises(TooLarge, match="elements"):
        torch.arange(900)[:, None] * torch.arange(900)
    with AllocationLimit(1000, 100):
        for _ in range(100):
            torch.ones(1)
        with pytest.raises(TooLarge, match="more modules"):
            torch.ones(1)
    with AllocationLimit(1000, 100):
        assert torch.empty(10**9, device="meta").is_meta
        assert float((torch.ones(30, 30) @ torch.ones(30, 1)).sum()) == 900


def test_tokens_that_the_model_does_not_have(model: Path, tmp_path: Path, capsys: Any) -> None:
    """On a GPU an index out of range would end the process."""
    source = SourceModel.open(model)
    for token in (2048, -1):
        with pytest.raises(
            InputError, match="and the model has 2048: give it the tokenizer that belongs to it"
        ):
            embed(source, torch.full((1, 8), token), CPU, CPU, torch.float32)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 5000, "content": " the ", "special": False, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), *QUICK]
    assert MAIN["awq"]([*words, "--calib_data", str(EMBEDDED_CALIBRATION)]) == 2
    assert "the model has 2048: give it the tokenizer that belongs to it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_limited(tmp_path / "a", 5) == b"12345"
    with pytest.raises(InputError, match="larger than"):
        read_limited(tmp_path / "a", 4)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_limited(path, 4)


# --- what is published of this machine -----------------------------------------------------------------------------


def test_without_paths() -> None:
    value = {"a": "/home/u/models/x", "b": ["/home/user2/x", "see /home/u/models/x", 3, None], "c": "/home/u"}
    assert without_paths(value, ("/home/u",)) == {
        "a": "x",
        "b": ["/home/user2/x", "see /home/u/models/x", 3, None],
        "c": "u",
    }


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_output_says_nothing_of_the_machine(method: str, model: Path, tmp_path: Path) -> None:
    """No file holds a path of the source, the target, the home or the data, nor the user's name."""
    home = tmp_path / "home-of-zyxwvut"
    home.mkdir()
    source = Path(shutil.copytree(model, home / "source-model"))
    (home / "words.txt").write_text(EMBEDDED_CALIBRATION.read_text()[:60_000])
    edit(source / "config.json", _name_or_path=str(source), text_source=str(home / "x"))
    edit(
        source / "tokenizer_config.json",
        name_or_path=str(source),
        special_tokens_map_file=f"{home}/cache/m.json",
    )
    edit(source / "trainer_state.json", best_model_checkpoint=str(source / "checkpoint-500"), note="é")
    edit(source / "generation_config.json", max_length=20)
    untouched = (source / "generation_config.json").read_bytes()
    words = ["--model_path", str(source), "--output_path", str(home / "target"), *QUICK]
    words += [
        "--calib_data",
        str(home / "words.txt"),
        "--eval_data",
        str(home / "words.txt"),
        "--eval_samples",
        "2",
    ]
    words = [w for i, w in enumerate(words) if w != "off" and words[i : i + 2] != ["--eval_data", "off"]]
    script = Path(checkpoint_files.__file__).parents[2] / f"{method}_quantize.py"
    environment = {"HOME": str(home), "USER": "zyxwvut", "LOGNAME": "zyxwvut", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = [p for p in (home / "target").rglob("*") if p.is_file()]
    assert len(files) >= 6
    # Names of this machine and user, where they are not words that texts have.
    own = [name for name in (os.uname().nodename, getpass.getuser()) if len(name) > 5]
    hidden = [str(tmp_path), "zyxwvut", "source-model/", *own]
    for file in files:
        data = file.read_bytes()
        assert not [word for word in hidden if word.encode() in data], file.name
    assert (home / "target" / "generation_config.json").read_bytes() == untouched
    state = json.loads((home / "target" / "trainer_state.json").read_text())
    assert state == {"best_model_checkpoint": "checkpoint-500", "note": "é"}
    assert json.loads((home / "target" / "config.json").read_text())["text_source"] == "x"


def test_models_are_looked_for_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local directory of that name comes first, and a name with `..` is no hub id."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "org" / "tiny")
    assert resolve_model("org/tiny", log=lambda line: None) == Path("org/tiny")
    for name in ("../../etc", "org/../x", "a\0b", "org/tiny@../../x/..", "x" * 300, "a/" + "x" * 300):
        with pytest.raises(InputError) as caught:
            resolve_model(name, log=lambda line: pytest.fail("the hub was asked"))
        assert "\n" not in str(caught.value)


# --- calibration files ----------------------------------------------------------------------------------------


def bomb(path: Path, start: bytes, unit: bytes, mebibytes: int) -> Path:
    """Write a gzip file of `mebibytes` of a repeated unit, which takes a thousandth of that on disk."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(start)
        block = unit * ((1 << 20) // len(unit))
        for _ in range(mebibytes):
            file.write(block)
    return path


@pytest.mark.parametrize(
    ("name", "start", "unit"),
    [
        ("a.txt.gz", b"", b"a"),
        ("a.txt.gz", b"", b"a b\n"),
        ("a.jsonl.gz", b'{"text": "', b"a"),
        ("a.jsonl.gz", b"", b'{"text": ""}\n'),
        ("a.jsonl.gz", b"", b"\n"),
        ("a.json.gz", b'[{"text": "', b"a"),
        ("a.json.gz", b"[", b"[" * 64),
        ("a.csv.gz", b"text\n", b"a"),
        ("a.csv.gz", b"text\n", b"a\n"),
        ("a.csv.gz", b"", b"a,"),
    ],
)
def test_text_that_grows_without_end_is_refused(
    name: str,
    start: bytes,
    unit: bytes,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_files, "GROWTH_FREE", 1 << 20)
    data = bomb(tmp_path / name, start, unit, 8)
    assert data.stat().st_size < (8 << 20) / 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(data)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert name in line
    refusals = (
        "unpacks to more than 100 times its size|longer than 1 MiB|nested too deeply|rows of fewer than"
    )
    assert re.search(refusals, line)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB
    assert not (tmp_path / "out").exists()


def repeated(kind: str, text: str, count: int) -> Any:
    """Make a column of a parquet file that holds one text and means `count` of them."""
    import pyarrow as pa

    shared = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([text]))
    one_row = pa.array([0, count], pa.int32())
    if kind == "text":
        return shared
    if kind in ("large_string", "binary"):
        values = pa.array([text]).cast(kind)
        return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), values)
    if kind == "list of strings":
        return pa.ListArray.from_arrays(one_row, shared)
    if kind == "nulls":
        return pa.nulls(count * 10, pa.string())
    if kind == "list of numbers":
        return pa.ListArray.from_arrays(pa.array([0, count * 400], pa.int32()), pa.repeat(1, count * 400))
    roles = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["user"]))
    return pa.ListArray.from_arrays(one_row, pa.StructArray.from_arrays([roles, shared], ["role", "content"]))


@pytest.mark.parametrize(
    "kind",
    ["text", "large_string", "binary", "list of strings", "messages", "nulls", "list of numbers"],
)
def test_parquet_that_grows_without_end_is_refused(kind: str, tmp_path: Path) -> None:
    """A file of some kilobytes stands for gigabytes: they are neither held nor read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = "messages" if kind == "messages" else "text"
    data = pa.table({column: repeated(kind, "a b " * (1 << 18), 100_000)})
    path = tmp_path / "a.parquet"
    pq.write_table(data, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 100_000
    del data
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = text_sources.open_table(path, seed=0)
    with pytest.raises(InputError) as caught, text_sources.reading(path):
        for _ in table.read(column):
            pass
    told = (
        "unpacks to more than 100 times its size|MiB of memory|holds bytes values|a row is longer than 64 MiB"
    )
    assert re.search(told, str(caught.value))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert children < 3 << 20  # KiB


@pytest.mark.parametrize(
    ("name", "start", "unit", "end"),
    [
        ("a.jsonl", "", '{"text": "a"}\n', ""),
        ("a.jsonl", "", '{"messages": [{"role": "user", "content": ""}]}\n', ""),
        ("a.jsonl", "", '{"text": null}\n', ""),
        ("a.json", "[", '"a",', '"a"]'),
        ("a.csv", "id,text\n", "1,a\n", ""),
    ],
)
def test_rows_that_hold_next_to_nothing_are_not_all_read(
    name: str, start: str, unit: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_tokenizer, "MANY", 20_000)
    tokenizer = SourceModel.open(EMBEDDED_MODEL).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    path = tmp_path / name
    config = CalibrationConfig(data=str(path), samples=4, seq_len=32)
    path.write_text(start + unit * 19_000 + end)
    load_windows(config, tokenizer, log=lambda line: None) if "null" not in unit else None
    path.write_text(start + unit * 40_000 + end)
    with pytest.raises(InputError, match="more than 20,000 rows of fewer than 8 characters on average"):
        load_windows(config, tokenizer, log=lambda line: None)


def test_parquet_whose_texts_repeat_is_read(tmp_path: Path) -> None:
    """Each of the texts is stored once, and meant sixty times."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    texts = [f"text {i} " + "a b c " * 1000 for i in range(50)] * 60
    turns = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"text": texts, "messages": turns}), path)
    table = text_sources.open_table(path, seed=0)
    assert list(table.read("text")) == texts
    assert list(table.read("messages")) == turns
    assert list(table.rows(["messages", "text"])) == list(zip(turns, texts, strict=True))


@pytest.mark.parametrize("key", ["_data_files", "dataset_dict"])
@pytest.mark.parametrize("name", ["../other/data.arrow", "/tmp/data.arrow", "link.arrow", 3])
def test_a_saved_dataset_cannot_name_what_is_elsewhere(key: str, name: Any, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["some words"]})
    with quiet():
        data.save_to_disk(tmp_path / "other")
        datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    with text_sources.reading(tmp_path):
        assert list(text_sources.open_table(tmp_path / "saved", seed=0).read("text")) == ["some words"]
    (arrow,) = (tmp_path / "other").glob("*.arrow")
    (tmp_path / "saved" / "train" / "link.arrow").symlink_to(arrow)
    if key == "dataset_dict":
        edit(tmp_path / "saved" / "dataset_dict.json", splits=[name])
    else:
        edit(tmp_path / "saved" / "train" / "state.json", _data_files=[{"filename": name}])
    with pytest.raises(InputError) as caught:
        text_sources.open_table(tmp_path / "saved", seed=0)
    assert "save the dataset again" in str(caught.value) or "link.arrow" in str(caught.value)


def saved_dataset(path: Path, *splits: str) -> Path:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["some words"]})
    with quiet():
        (datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data).save_to_disk(path)
    return path


@pytest.mark.parametrize("splits", [(), ("train", "test")], ids=["one", "several"])
@pytest.mark.parametrize("kind", ["link", "link inside", "pipe", "huge", "missing", "directory"])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json", "*.arrow"])
def test_files_of_a_saved_dataset_are_regular_and_inside(
    name: str, kind: str, splits: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_dataset(tmp_path / "saved", *splits)
    top = not splits or name == "dataset_dict.json"
    found = list((path if top else path / "test").glob(name))
    if not found:
        assert name == "dataset_dict.json"
        return
    if kind == "huge":
        if name == "*.arrow":
            return  # it is mapped, not read as a whole
        monkeypatch.setattr(saved_datasets, "_LARGEST_STATE", 10)
        monkeypatch.setattr(saved_datasets, "_LARGEST_DICT", 10)
    else:
        (file,) = found
        other = file.with_name("other") if kind == "link inside" else tmp_path / "other"
        file.rename(other)
        if kind.startswith("link"):
            file.symlink_to(other)
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
    if kind == "link inside":
        assert list(text_sources.open_table(path, seed=0).read("text")) == ["some words"]
        return
    with pytest.raises(InputError) as caught:
        text_sources.open_table(text_sources.locate(str(path)), seed=0)
    told = "leads out of it|is not a regular file|larger than 0 MiB|is missing|no dataset written by save_to_disk"
    assert re.search(told, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_split_that_is_a_link(tmp_path: Path) -> None:
    path = saved_dataset(tmp_path / "saved", "train", "test")
    (path / "train").rename(tmp_path / "elsewhere")
    (path / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"train in .*saved leads out of it: put a copy in its place"):
        text_sources.open_table(path, seed=0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "[]"),
        ("state.json", "{"),
        ("state.json", '{"_data_files": 3}'),
        ("state.json", '{"_data_files": [{}]}'),
        ("state.json", '{"_data_files": ["a"]}'),
        ("state.json", '{"_data_files": [{"filename": "a\\u0000"}]}'),
        ("dataset_info.json", "3"),
        ("dataset_dict.json", "3"),
        ("dataset_dict.json", "{}"),
        ("dataset_dict.json", '{"splits": "train"}'),
        ("dataset_dict.json", '{"splits": [["a"]]}'),
        ("dataset_dict.json", '{"splits": [".."]}'),
    ],
)
def test_what_a_saved_dataset_says_of_itself_is_not_believed(file: str, content: str, tmp_path: Path) -> None:
    path = saved_dataset(tmp_path / "saved")
    (path / file).write_text(content)
    with pytest.raises(InputError, match=r"save the dataset again|leads out of it"):
        text_sources.open_table(path, seed=0)


def test_the_files_that_a_column_of_images_names_are_not_opened() -> None:
    import datasets

    image = {"_type": "Image"}
    for features in ({"text": image}, {"text": {"feature": image, "_type": "List"}}, {"text": {"a": image}}):
        table = saved_datasets.arrow_table(FakeData(datasets.Features.from_dict(features)), "saved")
        with pytest.raises(InputError, match="saved, column text holds images, sound or video, and no text"):
            next(table.read("text"))


class FakeData:
    """What `arrow_table` reads before it reads rows."""

    column_names = ("text",)

    def __init__(self, features: Any) -> None:
        self.features = features

    def with_format(self, kind: None) -> FakeData:
        return self


@pytest.mark.parametrize("kind", ["numpy", "pandas", "arrow"])
def test_a_dataset_that_was_saved_for_another_library(kind: str, tmp_path: Path) -> None:
    import datasets

    rows = {"text": ["some words"], "messages": [[{"role": "user", "content": "a"}]]}
    with quiet():
        datasets.Dataset.from_dict(rows).with_format(kind).save_to_disk(tmp_path / "saved")
    table = text_sources.open_table(tmp_path / "saved", seed=0)
    assert list(table.rows(["text", "messages"])) == [("some words", [{"role": "user", "content": "a"}])]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet", "a.csv"])
def test_pipes_and_devices_are_no_calibration_data(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / name)
    assert MAIN["gptq"](["--calib_data", str(tmp_path / name), "--output_path", str(tmp_path / "out")]) == 2
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert MAIN["gptq"](["--calib_data", str(tmp_path / name), "--output_path", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("is no file" in line for line in lines)


def test_ordinary_text_that_packs_well_is_read(model: Path, tmp_path: Path) -> None:
    """Repetitive text shrinks to about a twentieth, a bomb to much less."""
    data = tmp_path / "a.txt.gz"
    with gzip.open(data, "wt") as file:
        for _ in range(8):
            file.write(EMBEDDED_CALIBRATION.read_text())
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(data)]) == 0


def test_a_parquet_file_with_damaged_statistics(tmp_path: Path) -> None:
    """pyarrow ends its process at some of them, which is not this one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some words", "more", None], "id": [1, 2, 3]}), path)
    data = path.read_bytes()
    script = (
        "import sys; from pathlib import Path\n"
        "from llm_quantize.calibration import text_sources\n"
        "from llm_quantize.errors import InputError\n"
        "path, told = Path(sys.argv[1]), 0\n"
        "data = path.read_bytes()\n"
        "for at in range(0, len(data), 53):\n"
        "    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:])\n"
        "    try:\n"
        "        with text_sources.reading(path): list(text_sources.open_table(path, seed=0).documents('text'))\n"
        "    except InputError: told += 1\n"
        "print(told)"
    )
    folder = str(Path(checkpoint_files.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(data) / 53 > int(done.stdout) > 4


@pytest.mark.parametrize("where", ["shard", "tensor", "method", "directory"])
def test_names_cannot_reach_the_terminal(
    where: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name may hold control sequences and line ends; it is shown in one line of plain characters."""
    odd = "\x1b]0;title\x07\x1b[31m\nx"
    index = model / "model.safetensors.index.json"
    if where == "shard":
        (model / "model.safetensors").unlink()
        index.write_text(json.dumps({"weight_map": {"a": odd}}))
    elif where == "tensor":
        tensors = load_file(model / "model.safetensors")
        save_file({**tensors, f"base_model.model.{odd}": torch.ones(1)}, model / "model.safetensors")
    elif where == "method":
        edit(model / "config.json", quantization_config={"quant_method": odd})
    else:
        model = model.rename(tmp_path / odd)
        (model / "config.json").unlink()
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), *QUICK]
    assert MAIN["gptq"]([*words, "--calib_data", str(EMBEDDED_CALIBRATION)]) == 2
    serving_main(["cpu", str(model)])
    shown = capsys.readouterr().err
    assert shown.count("\n") == len(shown.splitlines()) <= 2
    assert all(c.isprintable() for c in shown.replace("\n", ""))
