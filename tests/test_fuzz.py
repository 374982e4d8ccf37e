"""Test the readers of untrusted files on random input: each returns a value, or refuses in one line, nothing else.

In the suite each reader gets a fixed number of the same examples. `LLM_QUANTIZE_FUZZ=SECONDS` draws new examples
for so many seconds for each reader instead, and prints how many were run.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fake_checkpoints import whole_model
from llm_quantize.calibration import text_sources
from llm_quantize.calibration.hub_datasets import HubData
from llm_quantize.calibration.saved_datasets import quiet
from llm_quantize.calibration.table import Table
from llm_quantize.calibration.windows import CalibrationConfig, load_windows
from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.errors import InputError, WorkError
from llm_quantize.io.json_text import as_json
from llm_quantize.io.untrusted import check_counts, read_json
from llm_quantize.model.config_file import examine_config, published_config, with_old_rope_keys
from llm_quantize.model.model_forward import embed
from llm_quantize.model.source import SourceModel
from llm_quantize.model.weight_files import tensor_files
from llm_quantize.serving import checkpoint_files
from llm_quantize.serving import cli as serving_cli
from llm_quantize.serving.plan import plan_serving
from llm_quantize.serving.refusal import Refusal
from models import CPU, FAMILIES, write
from reference import write_rtn_checkpoint

SECONDS = float(os.environ.get("LLM_QUANTIZE_FUZZ", "0"))
Reader = Callable[[Path], object]

# --- what is drawn --------------------------------------------------------------------------------------------

ODD = [
    0,
    1,
    -1,
    4,
    32,
    128,
    2**31,
    2**63,
    10**9,
    10**40,
    0.5,
    4.0,
    float("inf"),
    float("nan"),
    "",
    "4",
    "gptq",
    "\0",
]
ODD += ["../x", "/etc/passwd", "\ud800", True, False, None, [], {}, [4], ["x"], {"a": 1}, [[[]]], "x" * 300]
LEAVES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def spots(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*at, key)
        yield from spots(value[key], (*at, key))


@st.composite
def changed(draw: st.DrawFn, whole: Any, most: int = 3) -> Any:
    """Draw a JSON document with up to `most` of its values replaced, removed, or put under another key."""
    document = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        places = list(spots(document))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        owner = document
        for key in path:
            owner = owner[key]
        what = draw(st.integers(0, 5))
        if what == 0:
            del owner[last]
        elif what == 1 and isinstance(owner, dict):
            owner[draw(st.text(max_size=12))] = owner.pop(last)
        else:
            owner[last] = copy.deepcopy(draw(VALUES))
    return document


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Draw `data` with some bytes changed, removed or doubled."""

    @st.composite
    def draw_bytes(draw: st.DrawFn) -> bytes:
        found = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, max(len(found) - 1, 0)))
            what = draw(st.integers(0, 3))
            if what == 0:
                found[at:] = b""
            elif what == 1:
                found[at : at + 1] = draw(st.binary(max_size=3))
            elif what == 2 and len(found) > at:
                found[at] ^= 1 << draw(st.integers(0, 7))
            else:
                found[at:at] = found[at : at + draw(st.integers(1, 64))]
        return bytes(found)

    return draw_bytes()


# --- running ---------------------------------------------------------------------------------------------------


def run(name: str, strategy: st.SearchStrategy[Any], body: Callable[[Any], None], examples: int) -> None:
    """Run `body` on examples of `strategy`: always the same ones, or new ones until the time is over."""
    count = 0

    def counted(value: Any) -> None:
        nonlocal count
        count += 1
        body(value)

    quiet = list(HealthCheck)
    if not SECONDS:
        settings(
            max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
        )(given(strategy)(counted))()
        assert count >= examples // 2
        return
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        settings(
            max_examples=500, database=None, deadline=None, suppress_health_check=quiet,
            phases=[Phase.generate, Phase.shrink],
        )(given(strategy)(counted))()  # fmt: skip
    print(f"\nfuzzed {name}: {count} executions in {SECONDS:g} s")


@contextmanager
def refusing(*kinds: type[BaseException]) -> Iterator[None]:
    """Allow these errors alone, each of one line that a terminal can show."""
    line = "-"
    try:
        yield
    except kinds as error:
        line = str(error)
    assert line
    assert "\n" not in line


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    write(root / "model", FAMILIES["llama"]())
    for name, bits in (("awq", 4), ("gptq", 4), ("compressed-tensors", 4)):
        write_rtn_checkpoint(root / "model", root / name, name, bits, 32, name != "awq")
    (root / "work").mkdir()
    return root


@pytest.fixture
def work(home: Path) -> Path:
    return home / "work"


# --- the readers ------------------------------------------------------------------------------------------------


def test_configs(home: Path, work: Path) -> None:
    """From a source's config.json to the skeleton of the model, and to the config.json that is published."""
    directory = Path(shutil.copytree(home / "model", work / "configs"))
    whole = json.loads((directory / "config.json").read_text())

    def body(value: Any) -> None:
        (directory / "config.json").write_bytes(dumped(value))
        with refusing(InputError, WorkError):
            model = SourceModel.open(directory)
            as_json(published_config(model.raw_config, directory)).encode()

    run("configs", changed(whole), body, 60)


# Keys that transformers reads, beside those that the files have.
KEYS = {
    "config.json": "eos_token_id pad_token_id rope_scaling rope_parameters architectures auto_map quantization_config "
    "compression_config id2label num_labels text_config torch_dtype dtype layer_types attn_implementation use_cache "
    "return_dict output_hidden_states output_attentions sliding_window num_experts chunk_size_feed_forward "
    "tokenizer_class generation_config configuration_files transformers_weights _commit_hash sub_configs _name_or_path "
    "attribute_map model_type transformers_version tie_word_embeddings is_encoder_decoder",
    "generation_config.json": "eos_token_id max_length temperature cache_implementation transformers_version "
    "custom_generate watermarking_config compile_config",
    "tokenizer_config.json": "chat_template added_tokens_decoder model_max_length tokenizer_class auto_map eos_token "
    "extra_special_tokens additional_special_tokens padding_side fast_tokenizer_files model_input_names add_bos_token "
    "add_prefix_space clean_up_tokenization_spaces backend name_or_path vocab_file processor_class",
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_values_of_other_types(family: str, work: Path, tmp_path: Path) -> None:
    """From the keys of three files to the states that enter the first block, and to all that is published of them."""
    directory = write(tmp_path / "model", FAMILIES[family]())
    text = work / "typed.txt"
    text.write_text("def some_words(that, are) -> None: ...\n" * 40)
    plain = CalibrationConfig(data=str(text), samples=2, seq_len=8)
    whole = {}
    for name in KEYS:
        path = directory / name
        whole[name] = json.loads(path.read_text()) if path.exists() else {}
    places = sorted((name, key) for name in KEYS for key in {*KEYS[name].split(), *whole[name]})
    changes = st.lists(
        st.tuples(st.sampled_from(places), st.sampled_from(ODD) | VALUES), min_size=1, max_size=2
    )

    def body(changed_values: list[tuple[tuple[str, str], Any]]) -> None:
        contents = copy.deepcopy(whole)
        for (name, key), value in changed_values:
            contents[name][key] = value
        for name, content in contents.items():
            (directory / name).write_bytes(dumped(content))
        with refusing(InputError, WorkError):
            model = SourceModel.open(directory)
            as_json(published_config(model.raw_config, directory)).encode()
            assert dict(model.side_files.published()).keys() >= {"tokenizer.json", "tokenizer_config.json"}
            tokens = load_windows(plain, model.tokenizer, log=lambda line: None).tokens
            embed(model, tokens, CPU, CPU, torch.float32)

    run(f"values of other types, {family}", changes, body, 60)


def test_configs_of_all_kinds() -> None:
    """The functions that take any JSON object."""
    whole = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": None,
        "text_config": {"quantization_config": None, "rope_parameters": {"rope_theta": 1.0}},
        "rope_parameters": {"rope_theta": 1.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        "num_experts": 0,
        "layers": [{"num_layers": 3}],
        "model_type": "gpt_neox",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"

        def body(value: Any) -> None:
            path.write_bytes(dumped(value))
            with refusing(InputError):
                config = examine_config(Path(folder))
                check_counts(config, 10)
                with_old_rope_keys(config)

        run("configs of all kinds", changed(whole, 4) | VALUES, body, 300)


def test_json_files() -> None:
    text = dumped({"a": [1, 2.5, None, True, "x\u00e9"], "b": {"c": {}}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"

        def body(data: bytes) -> None:
            path.write_bytes(data)
            with refusing(InputError):
                assert isinstance(read_json(path), dict)
            with refusing(Refusal):
                assert isinstance(checkpoint_files.read_json(path), dict)

        run("JSON files", damaged(text) | st.binary(max_size=40), body, 300)


def test_tokenizer_files(home: Path, work: Path) -> None:
    """From a source's tokenizer.json and tokenizer_config.json to token windows."""
    directory = Path(shutil.copytree(home / "model", work / "tokenizers"))
    text = work / "words.txt"
    text.write_text("def some_words(that, are) -> None: ...\n" * 40)
    small = json.loads((directory / "tokenizer.json").read_text())
    small["model"]["merges"] = small["model"]["merges"][:20]
    words = sorted(small["model"]["vocab"], key=small["model"]["vocab"].get)[:300]
    small["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    names = ("tokenizer.json", "tokenizer_config.json")
    settings_ = json.loads((directory / names[1]).read_text())
    plain = CalibrationConfig(data=str(text), samples=2, seq_len=8)

    def body(value: tuple[Any, Any]) -> None:
        for name, content in zip(names, value, strict=True):
            (directory / name).write_bytes(dumped(content))
        with refusing(InputError, WorkError):
            source = SourceModel.open(directory)
            load_windows(plain, source.tokenizer, log=lambda line: None)

    pairs = st.tuples(changed(small) | st.just(small), changed(settings_, 2) | st.just(settings_))
    run("tokenizers", pairs, body, 40)


def test_indexes(home: Path, work: Path) -> None:
    directory = Path(shutil.copytree(home / "model", work / "indexes"))
    names = list(load_file(directory / "model.safetensors"))[:6]
    (directory / "model.safetensors").rename(directory / "a.safetensors")  # one file goes before an index
    whole = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "a.safetensors")}

    def body(value: Any) -> None:
        (directory / "model.safetensors.index.json").write_bytes(dumped(value))
        with refusing(InputError):
            assert {p.parent for p in tensor_files(directory).values()} == {directory}
        with refusing(Refusal):
            assert {t.file.parent for t in checkpoint_files.read_tensors(directory).values()} == {directory}

    run("indexes", changed(whole), body, 300)


def test_headers(work: Path) -> None:
    """Whatever both readers of safetensors headers accept lies inside the file."""
    directory = work / "headers"
    directory.mkdir()
    path = directory / "model.safetensors"
    tensors = {"a": torch.zeros(4), "b.qweight": torch.zeros(2, 3, dtype=torch.int32), "c": torch.zeros(())}
    save_file(tensors, path, metadata={"format": "pt"})
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    whole, rest = json.loads(data[8 : 8 + length]), data[8 + length :]

    @st.composite
    def files(draw: st.DrawFn) -> bytes:
        text = dumped(draw(changed(whole)))
        said = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
        return struct.pack("<Q", said) + text + rest

    def body(content: bytes) -> None:
        path.write_bytes(content)
        with refusing(InputError):
            tensor_files(directory)
        with refusing(Refusal):
            found = checkpoint_files.read_tensors(directory)
            assert all(0 <= t.start <= t.end <= len(content) for t in found.values())

    run("headers", files() | damaged(data), body, 500)


def smaller(directory: Path, into: Path) -> Path:
    """Write a quantized checkpoint of few layers and norms, which takes little time to write again."""
    into.mkdir()
    tensors = load_file(directory / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layers.0.mlp" in n or n.endswith("norm.weight")}
    save_file(kept, into / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(directory / "config.json", into)
    return into


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_quantization_configs(name: str, home: Path, work: Path) -> None:
    """As `checkpoint.reader` reads them, and the check before serving with the command lines that it is given."""
    directory = smaller(home / name, work / f"settings-{name}")
    whole = json.loads((directory / "config.json").read_text())
    whole = {key: whole[key] for key in ("quantization_config", "num_attention_heads", "num_key_value_heads")}
    more = {"text_config": {"num_attention_heads": 4}, "dynamic": {"+:.*": {"bits": 4}}}
    whole["quantization_config"] = whole["quantization_config"] | more
    word_lists = [[], ["-q", name], ["--tensor-parallel-size", "2"], ["-tp=8", "--dtype", "half"]]

    def body(value: tuple[Any, str, list[str]]) -> None:
        config, device, words = value
        (directory / "config.json").write_bytes(dumped(config))
        with refusing(InputError, WorkError):
            found = QuantizedStore(directory)
            for tensor in found.files:
                found.read(tensor)
        with refusing(Refusal):
            plan_serving(device, str(directory), words)

    devices = st.sampled_from(["cuda", "cpu", "other"])
    run(
        f"{name} settings",
        st.tuples(changed(whole, 4), devices, st.sampled_from(word_lists)),
        body,
        120,
    )


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_tensors_of_other_shapes_and_types(name: str, home: Path, work: Path) -> None:
    directory = smaller(home / name, work / f"tensors-{name}")
    path = directory / "model.safetensors"
    whole = load_file(path)
    types = [torch.int32, torch.int64, torch.float16, torch.float32, torch.uint8, torch.bool, torch.bfloat16]
    shapes = st.lists(st.sampled_from([0, 1, 2, 8, 12, 32, 64, 96]), max_size=3).map(tuple)
    change = st.tuples(st.sampled_from(sorted(whole)), shapes, st.sampled_from(types), st.integers(-3, 300))

    def body(value: tuple[list[Any], str]) -> None:
        tensors = dict(whole)
        for changed_name, shape, dtype, fill in value[0]:
            tensors[changed_name] = torch.full(shape, fill).to(dtype)
        save_file(tensors, path, metadata={"format": "pt"})
        with refusing(InputError, WorkError):
            found = QuantizedStore(directory)
            for tensor in found.files:
                with refusing(WorkError):
                    found.read(tensor)
        with refusing(Refusal):
            plan_serving(value[1], str(directory), [])

    devices = st.sampled_from(["cuda", "cpu"])
    run(f"{name} tensors", st.tuples(st.lists(change, min_size=1, max_size=3), devices), body, 120)


PLAIN_WORDS = """
    -q -qgptq --quant --quantization=awq awq --dtype fp32 half -tp 2 4 --config --config=x --host --host= 0.0.0.0
    --load-format dummy --hf-overrides {} -- - --enable-expert-parallel --model-impl --api-key --model
"""
WORDS = [*PLAIN_WORDS.split(), "", "é", "\x1b[2J", "a\nb"]


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_serve_check(name: str, work: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The whole command on models of all their tensors: a plan, or one line and exit code 2."""
    directory = work / f"serve-{name}"
    model = whole_model(
        name, blocks=1, shapes={"mlp.up_proj": (16, 32), "mlp.down_proj": (32, 16)}, group_size=16
    )
    model.config |= {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}
    model.write(directory)
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    more = {
        "dynamic": {"+:.*up": {"bits": 4}, "-:.*mtp": {}},
        "modules_in_block_to_quantize": None,
        "lm_head": False,
    }
    config = model.config | {"text_config": None, "quantization_config": model.settings | more}
    seen = set()

    def body(value: tuple[Any, bytes | None, str, list[str]]) -> None:
        changed_config, changed_header, device, words = value
        (directory / "config.json").write_bytes(dumped(changed_config))
        path.write_bytes(
            data if changed_header is None else struct.pack("<Q", len(changed_header)) + changed_header + rest
        )
        code = serving_cli.main([device, str(directory), *words])
        out, err = capfdbinary.readouterr()
        seen.add(code)
        lines = err.decode().split("\n")
        assert lines.pop() == ""
        assert all(line.startswith("run_vllm.sh: ") and line.isprintable() for line in lines)
        if code == 0:
            assert out.split(b"\0")[:2] == [os.fsencode(directory), b"local"]
            assert all(line.startswith("run_vllm.sh: note: ") for line in lines)
        else:
            assert (code, out, len(lines)) == (2, b"", 1)

    headers = st.none() | changed(header, 2).map(dumped) | damaged(json.dumps(header).encode())
    words = st.lists(st.sampled_from(WORDS), max_size=3)
    devices = st.sampled_from(["cuda", "cpu", "other"])
    configs = changed(config, 3) | st.just(config)
    run(f"serve_check, {name}", st.tuples(configs, headers, devices, words), body, 200)
    assert seen == {0, 2}


RECORDS = [
    {"text": "some words", "id": 3},
    {"text": None},
    {"messages": [{"role": "user", "content": "hello"}, {"from": "gpt", "value": "x"}]},
    {"messages": {"role": ["user", "gpt"], "content": ["a", "b"]}},
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
        "tools": [{"a": 1}],
    },
    {"messages": '[{"role": "user", "content": "hello"}]', "tools": '[{"name": "f"}]'},
    {
        "messages": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            }
        ]
    },
    "words alone",
]
LINES = b"".join(dumped(record) + b"\n" for record in RECORDS)
FILES: dict[str, bytes] = {
    "a.txt": "some w\u00f6rds\n\non lines\n".encode(),
    "a.jsonl": LINES,
    "a.json": dumped({"version": 1, "data": RECORDS[:3]}),
    "a.csv": b'id,text\n1,"some, ""words"""\n2,more\n',
    "b.csv": 'text;id\n"some; ""words""";1\ntext;id\nmore, and more;2\n'.encode("utf-16"),
    "b.txt": "some w\u00f6rds\n\non lines\n".encode("utf-16-le"),
    "b.json": dumped(RECORDS),
    "a.txt.gz": gzip.compress(b"some words on lines\n" * 20, mtime=0),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
}


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    turns = [[{"role": "user", "content": "hello"}], [{"role": "gpt", "content": "x"}], None]
    pq.write_table(pa.table({"text": ["some words", "more", None], "id": [1, 2, 3], "messages": turns}), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Any:
    found = SourceModel.open(home / "model").tokenizer
    found.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
    return found


@pytest.mark.parametrize("name", [*FILES, "a.parquet"])
def test_calibration_files(name: str, tokenizer: Any, work: Path) -> None:
    """From files to token windows, through the chat template where they hold conversations."""
    data = parquet() if name == "a.parquet" else FILES[name]
    path = work / name
    strategy: st.SearchStrategy[bytes] = damaged(data) | st.binary(max_size=60)
    if name.endswith((".jsonl", ".json")):
        records = st.lists(changed(RECORDS) | VALUES, max_size=4)
        strategy |= records.map(lambda r: b"\n".join(map(dumped, r)))
        strategy |= records.map(dumped)

    def body(content: bytes) -> None:
        path.write_bytes(content)
        read_windows(path, tokenizer)

    run(name, strategy, body, 12 if name == "a.parquet" else 60)  # each of which starts processes


# Faults of the program's own, not of what it reads.
OWN = TypeError | KeyError | AttributeError | IndexError | UnicodeEncodeError | FileNotFoundError


def read_windows(path: Path, tokenizer: Any, column: str | None = None, *, library: bool = False) -> None:
    """Read token windows; everything that is told can be printed. library: another library may fail on its own."""
    lines: list[str] = []
    with refusing(InputError):
        try:
            windows = load_windows(
                CalibrationConfig(data=str(path), samples=2, seq_len=4, column=column),
                tokenizer,
                log=lines.append,
            )
        except InputError as error:
            if not library and isinstance(error.__cause__, OWN):
                raise error.__cause__ from None
            raise
        assert windows.tokens.shape[1] == 4
        lines.append(str(windows))
    assert all(line.encode() and "\n" not in line for line in lines)


@pytest.mark.parametrize("column", ["text", "messages"])
def test_values_of_a_column(column: str, tokenizer: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of any kind in rows of any source, with tools and without."""
    kinds = [record.get(column) for record in RECORDS if isinstance(record, dict)]
    value = changed({"value": kinds}).map(lambda found: found.get("value")) | VALUES
    rows = st.lists(st.tuples(value | value.map(json.dumps), VALUES | st.just([{"name": "f"}])), max_size=4)

    def body(drawn: list[tuple[Any, Any]]) -> None:
        flat = [
            (v, tools) for values, tools in drawn for v in (values if isinstance(values, list) else [values])
        ]

        def read(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
            return (tuple(row[(column, "tools").index(name)] for name in columns) for row in flat)

        table = Table("rows", (column, "tools") if len(flat) % 2 else (column,), read)
        monkeypatch.setattr(text_sources, "open_table", lambda source, **options: table)
        read_windows(work / "a.txt", tokenizer, column)

    (work / "a.txt").touch()
    run(f"values of {column}", rows, body, 150)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "dataset_dict.json"])
def test_what_saved_datasets_say_of_themselves(name: str, tokenizer: Any, work: Path) -> None:
    import datasets

    path = work / f"saved-{name}"
    with quiet():
        data = datasets.Dataset.from_dict({"text": ["some words", "more"], "id": [1, 2]})
        datasets.DatasetDict({"train": data, "test": data}).save_to_disk(path)
    file = path / name if name == "dataset_dict.json" else path / "train" / name
    whole = file.read_bytes()

    def body(content: bytes) -> None:
        file.write_bytes(content)
        read_windows(path, tokenizer, "text", library=True)

    run(name, damaged(whole) | changed(json.loads(whole)).map(dumped) | VALUES.map(dumped), body, 60)


def test_names_of_calibration_data() -> None:
    pieces = st.sampled_from(
        ["wikitext", "c4", ":", "/", "..", ".", "a", ".txt", "~", "\0", "org/name", " ", "\\", "é"]
    )

    def body(text: str) -> None:
        with refusing(InputError):
            found = text_sources.locate(text)
            assert isinstance(found, Path | HubData)

    run("names", st.lists(pieces, max_size=6).map("".join) | st.text(max_size=20), body, 300)
