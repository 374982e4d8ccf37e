"""Test libraries in this program's place: what is refused, what the two processes send each other, what is accepted.

A script of a few lines in this interpreter stands for the library; tests with the marker `readers` run the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import gptq_quantize
from conftest import MAIN, Finished, Runs
from llm_quantize import cli
from llm_quantize.backends import registry
from llm_quantize.backends import session as session_module
from llm_quantize.blockwise.block import BlockWork
from llm_quantize.calibration.windows import CalibrationConfig
from llm_quantize.checkpoint.external import verify_external
from llm_quantize.config import QuantizeConfig
from llm_quantize.console import Console
from llm_quantize.device import Device
from llm_quantize.errors import InputError, WorkError
from llm_quantize.formats import FORMATS
from llm_quantize.io.embedded_files import EMBEDDED_HELDOUT, EMBEDDED_MODEL
from llm_quantize.model.source import SourceModel
from llm_quantize.types import QuantScheme
from models import CPU, FAMILIES, write

SCRIPTS = session_module.SCRIPTS
QUICK = ["--calib_samples", "16", "--calib_seq_len", "128", "--eval_samples", "2", "--device", "cpu"]

# -- what is refused before any work


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("awq", "--backend optimum", "invalid choice: 'optimum'"),
        ("gptq", "--backend autoawq", "invalid choice: 'autoawq'"),
        ("awq", "--backend autoawq --bits 8", "AutoAWQ 0.2.9 writes AWQ at 4 bits"),
        ("awq", "--backend gptqmodel --bits 8", "GPTQModel 7.7.0 writes AWQ at 4 bits"),
        ("awq", "--backend autoawq --group_size -1", "AutoAWQ 0.2.9 takes groups alone"),
        ("awq", "--backend autoawq --zero_point false", "cannot write symmetric groups"),
        ("awq", "--backend gptqmodel --group_size 256", "takes -1, 32, 64, 128"),
        ("awq", "--backend autoawq --format compressed-tensors", "AutoAWQ 0.2.9 writes awq"),
        ("gptq", "--backend optimum --group_size 96", "takes -1, 32, 64, 128, 256, 512, 1024"),
        ("gptq", "--backend auto-gptq --quality best", "has no such choice"),
        ("gptq", "--backend gptqmodel --max_memory 6", "cannot be kept under a limit"),
        ("gptq", "--backend auto-gptq --damp_percent 0", "more than 0 and less than 1"),
        ("gptq", "--backend optimum --damp_percent 1", "more than 0 and less than 1"),
    ],
)
def test_what_a_library_cannot_do_is_refused(
    method: str, words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        MAIN[method](words.split())
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("awq", "--backend autoawq --group_size 32"),
        ("awq", "--backend gptqmodel --zero_point false --group_size -1"),
        ("gptq", "--backend auto-gptq --bits 3 --sym false --act_order_groups dynamic"),
        ("gptq", "--backend optimum --bits 2 --desc_act false --format gptq"),
        ("gptq", "--backend gptqmodel --bits 8 --group_size 1024"),
    ],
)
def test_what_it_can_do_is_written_in_the_format_of_the_method(method: str, words: str) -> None:
    assert cli.parse(method, words.split()).checkpoint_format.name == method  # type: ignore[arg-type]


def test_models_that_a_library_does_not_take_are_refused() -> None:
    registry.check_model("autoawq", "qwen3", {"q": 64})
    registry.check_model("gptqmodel", "newer_than_all", {"q": 40})
    with pytest.raises(InputError, match=r"AutoGPTQ 0\.7\.1 does not take models of type qwen3"):
        registry.check_model("auto-gptq", "qwen3", {"q": 64})
    # AutoAWQ would write a scaled activation, which no one else reads.
    with pytest.raises(InputError, match="gpt_neox"):
        registry.check_model("autoawq", "gpt_neox", {"q": 64})
    with pytest.raises(
        InputError, match=r"v_proj has 96 outputs, and AutoAWQ 0\.2\.9 needs a multiple of 64"
    ):
        registry.check_model("autoawq", "llama", {"q_proj": 128, "v_proj": 96})


def test_a_model_is_refused_before_an_environment_is_made(
    tmp_path: Path,
    saved: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "COMMAND", ("no-such-program-is-started",))
    words = [
        "--backend",
        "auto-gptq",
        "--model_path",
        str(saved("qwen3")),
        "--output_path",
        str(tmp_path / "o"),
    ]
    assert gptq_quantize.main([*words, "--group_size", "32", "--device", "cpu"]) == 2
    assert "does not take models of type qwen3" in capsys.readouterr().err


def _config(method: Any = "gptq", **more: Any) -> QuantizeConfig:
    return QuantizeConfig(method=method, calibration=CalibrationConfig(), **more)


def test_what_vllm_refuses_depends_on_the_library_that_writes_it() -> None:
    assert "marks activation order" in str(_config(backend="auto-gptq").vllm_refusal)
    assert _config(backend="auto-gptq", desc_act=False).vllm_refusal is None
    assert _config(backend="auto-gptq", group_size=-1).vllm_refusal is None
    assert _config(backend="optimum").vllm_refusal is None
    assert _config().vllm_refusal is None
    assert "dynamic" in str(_config(backend="gptqmodel", act_order_groups="dynamic").vllm_refusal)
    assert "3 bits" in str(_config(backend="gptqmodel", bits=3).vllm_refusal)


# -- the scripts


@pytest.mark.parametrize("name", registry.LIBRARIES)
def test_scripts_pin_what_they_install(name: str) -> None:
    library = registry.LIBRARIES[name]
    text = (SCRIPTS / library.script).read_text("utf-8")
    found = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    assert found
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in found[1].splitlines(keepends=True)))
    assert metadata["requires-python"] == "==3.11.*"
    pins = metadata["dependencies"]
    assert f"{library.distribution}=={library.version}" in pins
    assert all(re.fullmatch(r"[A-Za-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert {"torch", "transformers"} <= {pin.partition("==")[0] for pin in pins}


def test_no_script_hides_a_package() -> None:
    """Python looks into a script's directory first for what it imports."""
    names = {path.stem for path in SCRIPTS.glob("*.py")} - {"__init__"}
    assert names == {"child"} | {Path(library.script).stem for library in registry.LIBRARIES.values()}
    assert not names & {"awq", "auto_gptq", "optimum", "gptqmodel", "torch", "transformers", "datasets"}


# -- both processes


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a script with a body of `quantize(job, channel)`, and let it stand for every library."""

    def make(body: str, load: str = "pass") -> None:
        text = f"""
            import sys, os, time, shutil, pathlib, signal
            sys.path.insert(0, {str(SCRIPTS)!r})
            import child
            child._memory = lambda: {{"device_bytes": 0, "host_bytes": 3 << 30}}

            def load():
                {load}

            def quantize(job, channel):
        """
        text = textwrap.dedent(text) + textwrap.indent(textwrap.dedent(body).strip(), "    ")
        text += '\n\nraise SystemExit(child.run(("numpy",), load, quantize))\n'
        scripts = tmp_path / "scripts"
        scripts.mkdir(exist_ok=True)
        for each in registry.LIBRARIES.values():
            (scripts / each.script).write_text(text)
        monkeypatch.setattr(session_module, "SCRIPTS", scripts)
        monkeypatch.setattr(session_module, "COMMAND", (sys.executable,))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # logs and scratch

    return make


def _session(name: str = "auto-gptq") -> session_module.Session:
    return session_module.Session(registry.LIBRARIES[name], CPU, Console(quiet=True))


def _job(**more: Any) -> session_module.Job:
    values: dict[str, Any] = {
        "model": "m", "output": "o", "windows": "w", "method": "gptq", "bits": 4, "group_size": 128,
        "symmetric": True, "act_order": "static", "damping": 0.1, "dtype": "float16", "blocks": 4,
        "device": "cpu", "trust_remote_code": False,
    }  # fmt: skip
    return session_module.Job(**values | more)


class _Seen:
    """A console's progress that records its calls."""

    total = 4

    def __init__(self) -> None:
        self.done = 0
        self.steps: list[str] = []

    def advance(self) -> None:
        self.done += 1

    def step(self, text: str) -> None:
        self.steps.append(text)


def _quantize(
    session: session_module.Session, job: session_module.Job | None = None
) -> tuple[session_module.Outcome, _Seen]:
    seen: Any = _Seen()
    return session.quantize(job or _job(), seen), seen


def _left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"scripts"}


def test_progress_and_result_arrive(library: Callable[..., None], tmp_path: Path) -> None:
    library("""
        print("a library that talks on standard output")
        os.write(1, b'{"event": "done", "seconds": {}, "device_bytes": 0, "host_bytes": 0}\\n')
        channel.seconds["quantize"] = 1.5
        for done in (1, 1, 3):
            channel.block(done, job.blocks)
        channel.step(f"{job.method} at {job.bits} bits, {job.act_order}, {job.dtype}")
    """)
    with _session() as session:
        assert set(session.versions) == {"numpy"}
        outcome, seen = _quantize(session)
    assert outcome == session_module.Outcome({"quantize": 1.5}, 0, 3 << 30)
    assert seen.done == 3
    assert seen.steps == ["AutoGPTQ: gptq at 4 bits, static, float16"]
    assert _left(tmp_path) == set()


def test_a_failure_is_one_line_with_the_log(library: Callable[..., None], tmp_path: Path) -> None:
    library('print("before"); raise RuntimeError("no\\nsuch layer " + "x" * 1000)')
    with _session() as session, pytest.raises(WorkError) as failed:
        _quantize(session)
    line = str(failed.value)
    assert line.startswith("AutoGPTQ 0.7.1 failed: RuntimeError: no such layer xxx")
    assert "\n" not in line
    assert len(line) < 600
    log = Path(line.rpartition("see ")[2])
    assert "before" in log.read_text()
    assert "Traceback" in log.read_text()
    assert _left(tmp_path) == {log.name}


def test_memory_that_runs_out_says_what_to_do(library: Callable[..., None]) -> None:
    library("raise MemoryError")
    with _session() as session, pytest.raises(WorkError, match="out of memory: lower --calib_samples"):
        _quantize(session)


def test_a_killed_process_is_reported(library: Callable[..., None]) -> None:
    library("os.kill(os.getpid(), signal.SIGKILL)")
    with _session() as session, pytest.raises(WorkError, match=r"ended without a result.*killed"):
        _quantize(session)


def test_a_job_that_it_cannot_do_is_bad_input(library: Callable[..., None]) -> None:
    library('raise child.Refused("no models of type t")')
    with _session() as session, pytest.raises(InputError, match=r"^AutoGPTQ 0\.7\.1: no models of type t$"):
        _quantize(session)


def test_a_library_that_does_not_import_is_reported_before_any_work(library: Callable[..., None]) -> None:
    library("pass", load="import no_such_module_at_all")
    with pytest.raises(InputError, match="cannot be used here: ModuleNotFoundError: No module named"):
        _session().__enter__()


def test_no_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"needs uv .* install it"):
        _session().__enter__()


@pytest.mark.skipif(shutil.which("uv") is None, reason="no uv")
def test_no_package_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name, value in {
        "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=r"no environment for AutoGPTQ 0\.7\.1 .*needs a package index"
    ) as caught:
        _session().__enter__()
    assert Path(str(caught.value).rpartition(" is in ")[2]).read_text()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _gone(pid: int) -> bool:
    for _ in range(600):
        if not _alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_leaving_ends_the_library(library: Callable[..., None], tmp_path: Path) -> None:
    """After Ctrl-C in the middle of a job neither the process nor its files are left."""
    library(f"""
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        channel.step("busy")
        time.sleep(600)
    """)

    class Interrupted(_Seen):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    seen: Any = Interrupted()
    with pytest.raises(KeyboardInterrupt), _session() as session:
        session.quantize(_job(), seen)
    assert _gone(int((tmp_path / "pid").read_text()))
    assert _left(tmp_path) == {"pid"}


def test_a_killed_parent_takes_the_library_with_it(library: Callable[..., None], tmp_path: Path) -> None:
    library(f"""
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        time.sleep(600)
    """)
    code = f"""
        import sys, pathlib
        sys.path.insert(0, {str(SCRIPTS.parents[2])!r})
        from llm_quantize import console
        from llm_quantize.backends import registry, session as session_module
        session_module.SCRIPTS = pathlib.Path({str(tmp_path / "scripts")!r})
        session_module.COMMAND = (sys.executable,)
        quiet = console.Console(quiet=True)
        library, cpu = registry.LIBRARIES["optimum"], session_module.torch.device("cpu")
        with session_module.Session(library, cpu, quiet) as session:
            session.quantize(session_module.Job(**{asdict(_job())!r}), console.Blocks(4))
    """
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=env)
    try:
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    assert _gone(int((tmp_path / "pid").read_text()))


def test_the_environment_of_the_other_python() -> None:
    outer = {
        "PATH": "/bin", "HOME": "/h", "UV_FIND_LINKS": "/w", "PYTHONPATH": "/p", "PYTHONWARNINGS": "error",
        "VIRTUAL_ENV": "/v", "CONDA_PREFIX": "/c", "UV_PROJECT_ENVIRONMENT": "/e", "CUDA_VISIBLE_DEVICES": "3,GPU-7",
    }  # fmt: skip
    env = session_module.environment(outer, CPU)
    assert {name: env[name] for name in ("PATH", "HOME", "UV_FIND_LINKS")} == {
        "PATH": "/bin", "HOME": "/h", "UV_FIND_LINKS": "/w",
    }  # fmt: skip
    assert not {
        "PYTHONPATH",
        "PYTHONWARNINGS",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "UV_PROJECT_ENVIRONMENT",
    } & set(env)
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["HF_HUB_OFFLINE"] == "1"
    assert session_module.environment(outer, torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert session_module.environment({}, torch.device("cuda", 2))["CUDA_VISIBLE_DEVICES"] == "2"
    assert session_module.environment({}, torch.device("cuda"))["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(("cores", "workers"), [(1, "2"), (2, "2"), (3, None)])
def test_gptqmodel_gets_two_workers_on_small_machines(
    cores: int, workers: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert session_module.environment({}, CPU).get("GPTQMODEL_CPU_WORKERS") == workers


# -- a model as transformers 4 reads it


def test_rotary_embeddings_for_older_readers() -> None:
    plain = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert session_module.older_config(plain, "L") == {**plain, "rope_theta": 5e5}
    old = {"model_type": "llama", "rope_theta": 1e4}
    assert session_module.older_config(old, "L") == old
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    assert session_module.older_config(scaled, "L")["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    partial = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    assert session_module.older_config(partial, "L")["partial_rotary_factor"] == 0.25
    neox = session_module.older_config({"model_type": "gpt_neox", **partial}, "L")
    assert (neox["rotary_pct"], neox["rotary_emb_base"]) == (0.25, 1e4)
    layered = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}
    with pytest.raises(InputError, match=r"^L cannot read this model's rotary embeddings"):
        session_module.older_config(layered, "L")


def test_the_view_of_a_model(library: Callable[..., None], tmp_path: Path) -> None:
    """It links to files that are safe to read; a library on transformers 4 gets a config.json that it can read."""
    library("pass")
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    directory = write(tmp_path / "model", config, dtype=torch.float16)
    for name in ("modeling_own.py", "pytorch_model.bin", "notes.txt"):
        (directory / name).write_text("{}")
    code = {"AutoConfig": "modeling_own.Config"}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, "auto_map": code}))
    source = SourceModel.open(directory)
    every = {path.name for path in directory.iterdir()} - {"pytorch_model.bin"}
    with _session("auto-gptq") as session:
        view = session.model(source, trust=False)
        assert {path.name for path in view.iterdir()} == every - {"modeling_own.py"}
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in (view / name).read_text()
            assert "auto_map" in (directory / name).read_text()
        assert json.loads((view / "config.json").read_text())["rope_theta"] == 5e5
        assert AutoConfig.from_pretrained(view).to_dict()["rope_parameters"] == config.rope_parameters
        assert (view / "model.safetensors").resolve() == (directory / "model.safetensors").resolve()
    with _session("gptqmodel") as session:
        view = session.model(source, trust=True)
        assert {path.name for path in view.iterdir()} == every
        assert json.loads((view / "config.json").read_text()) == json.loads(
            (directory / "config.json").read_text()
        )


# -- what it wrote


@pytest.fixture(scope="module")
def written(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a library might write: a checkpoint's own files, with nothing copied from the source."""
    made = tmp_path_factory.mktemp("written") / "checkpoint"
    made.mkdir()
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        shutil.copy(runs("gptq").path / name, made)
    return made


def _verify(
    directory: Path, source: SourceModel | None = None, *, bits: int = 4, group_size: int = 128
) -> int:
    model = source or SourceModel.open(EMBEDDED_MODEL)
    return verify_external(directory, model, FORMATS["gptq"], QuantScheme(bits, group_size, True), "Lib 1")


def _changed(written: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(written, tmp_path / "changed")
    tensors = load_file(written / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "changed"


LINEAR = "model.layers.1.mlp.up_proj"
HEAD = torch.zeros(2048, 256, dtype=torch.float16)


def test_a_good_checkpoint_is_accepted(written: Path, tmp_path: Path) -> None:
    size = sum(tensor.nbytes for tensor in load_file(written / "model.safetensors").values())
    assert _verify(written) == size

    def as_autogptq(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{LINEAR}.bias"] = torch.zeros(512, dtype=torch.float16)

    assert _verify(_changed(written, tmp_path, as_autogptq)) == size + HEAD.nbytes + 1024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LINEAR}.g_idx"), rf"Lib 1 left out {LINEAR}\.g_idx"),
        (lambda t: t.pop("model.norm.weight"), r"left out model\.norm\.weight"),
        (lambda t: t.update({"model.extra": HEAD}), r"wrote model\.extra, which is no tensor of this model"),
        (
            lambda t: t.update({f"{LINEAR}.bias": torch.ones(512)}),
            rf"{LINEAR}\.bias, a bias that the model does",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(255)}), r"model\.norm\.weight as .*\(255,\)"),
        (
            lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].float()}),
            r"qweight as torch\.float32",
        ),
        (lambda t: t[f"{LINEAR}.scales"].view(-1)[3:4].fill_(float("nan")), r"scales by Lib 1 has NaN"),
        (
            lambda t: t["model.norm.weight"][0:1].fill_(float("inf")),
            r"model\.norm\.weight by Lib 1 has NaN or inf",
        ),
    ],
    ids=["no g_idx", "no norm", "one too many", "a bias", "shape", "dtype", "NaN", "infinite"],
)
def test_a_bad_one_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], said: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorkError, match=said):
        _verify(_changed(written, tmp_path, change))


def test_one_in_another_format_or_of_another_model_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="wrote gptq at 4 bits instead of gptq at 8"):
        _verify(written, bits=8)
    with pytest.raises(WorkError, match=r"qzeros as torch\.int32 \(4, 32\), not with shape \(16, 32\)"):
        _verify(written, group_size=32)
    shutil.copytree(written, tmp_path / "other")
    config = json.loads((written / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkError, match=r"Lib 1 changed rope_parameters in config\.json"):
        _verify(tmp_path / "other")


def test_a_pad_token_may_be_given_to_a_model_without(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "padded")
    source = SourceModel.open(EMBEDDED_MODEL)
    config = json.loads((written / "config.json").read_text()) | {"pad_token_id": 7}
    (tmp_path / "padded" / "config.json").write_text(json.dumps(config))
    size = _verify(written)
    with pytest.raises(WorkError, match="changed pad_token_id"):
        _verify(tmp_path / "padded", source=source)
    source.config.pad_token_id = None
    assert _verify(tmp_path / "padded", source=source) == size


# -- the whole run


def _copying(written: Path) -> str:
    return f"""
        for path in pathlib.Path({str(written)!r}).iterdir():
            shutil.copy(path, job.output)
        os.chmod(os.path.join(job.output, "model.safetensors"), 0o600)
        channel.seconds["quantize"] = 2.0
        channel.block(job.blocks, job.blocks)
    """


def test_a_library_run_is_published_as_it_was_written(
    library: Callable[..., None],
    written: Path,
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library(_copying(written))
    out = tmp_path / "out"
    assert gptq_quantize.main(["--backend", "optimum", *QUICK, "--output_path", str(out)]) == 0
    for path in written.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    for path in EMBEDDED_MODEL.iterdir():
        assert (out / path.name).is_file()
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["backend"] == "optimum"
    assert set(report["versions"]) >= {"numpy"}
    card = (out / "README.md").read_text()
    assert "quantized to 4 bits by GPTQ with Optimum 2.3.0: symmetric, groups of 128" in card
    assert "--backend optimum" in card
    assert "--quality" not in card
    assert "## Layers" not in card
    assert not (out / "quantization_error.png").exists()
    said = capsys.readouterr()
    assert re.search(r"by +numpy \d", said.out)
    assert "quantize 2.0 s" in said.out
    assert "block 4/4 done" in said.err
    kl = re.search(r"KL divergence +([0-9.]+)", said.out)
    assert kl
    again = gptq_quantize.main([*QUICK, "--output_path", str(tmp_path / "native")])
    assert again == 0
    native = re.search(r"KL divergence +([0-9.]+)", capsys.readouterr().out)
    assert native
    assert kl[1] == native[1]
    assert _left(tmp_path) == {"out", "native"}


@pytest.mark.parametrize(
    ("body", "more", "said"),
    [
        ('raise RuntimeError("broken")', [], "Optimum 2.3.0 failed: RuntimeError: broken"),
        ("pass", [], "has no config.json"),
        (None, ["--bits", "8"], "wrote gptq at 4 bits instead of gptq at 8"),
        (None, ["--max_kl", "0.0001"], "over --max_kl 0.0001: nothing published"),
    ],
)
def test_a_library_run_that_fails_publishes_nothing(
    body: str | None,
    more: list[str],
    said: str,
    library: Callable[..., None],
    written: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    library(body or _copying(written))
    out = tmp_path / "deep" / "out"
    assert gptq_quantize.main(["--backend", "optimum", *QUICK, *more, "--output_path", str(out)]) == 1
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert {path for path in _left(tmp_path) if not path.endswith(".log")} == set()


def test_an_interrupted_run_of_this_program_is_not_thrown_away(
    library: Callable[..., None],
    written: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library(_copying(written))
    quantize = BlockWork.quantize

    def stop(work: BlockWork, writer: Any) -> Any:
        if work._index:
            raise KeyboardInterrupt
        return quantize(work, writer)

    words = [*QUICK, "--output_path", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(BlockWork, "quantize", stop)
        assert gptq_quantize.main(words) == 130
    assert gptq_quantize.main(["--backend", "optimum", *words]) == 2
    assert "--backend" in capsys.readouterr().err.splitlines()[-1]
    assert gptq_quantize.main(["--backend", "optimum", "--restart", *words]) == 0
    assert (tmp_path / "out" / "config.json").is_file()


# -- the real ones


REAL = [
    ("awq", "autoawq", ""),
    ("awq", "gptqmodel", "--zero_point false"),
    ("gptq", "auto-gptq", "--bits 3 --act_order_groups dynamic"),
    ("gptq", "optimum", "--sym false --group_size 32"),
    ("gptq", "gptqmodel", "--bits 8"),
]
if os.environ.get("LLM_QUANTIZE_ALL_BACKENDS"):  # half a minute each and more
    REAL += [
        ("awq", "autoawq", "--group_size 64"),
        ("awq", "gptqmodel", "--group_size -1"),
        ("gptq", "auto-gptq", ""),
        ("gptq", "auto-gptq", "--bits 2 --group_size 32 --desc_act false"),
        ("gptq", "auto-gptq", "--bits 8 --sym false --group_size -1"),
        ("gptq", "optimum", "--bits 2 --group_size 32"),
        ("gptq", "optimum", "--bits 3 --act_order_groups dynamic"),
        ("gptq", "gptqmodel", ""),
        ("gptq", "gptqmodel", "--bits 3 --sym false --act_order_groups dynamic"),
        ("gptq", "gptqmodel", "--bits 2 --group_size 32 --desc_act false"),
    ]
# KL divergence at most, by bits. Round to nearest is at 0.03 at 4 bits; a file read wrongly is at 1 and more.
AT_MOST = {2: 0.4, 3: 0.1, 4: 0.03, 8: 0.001}


def _measured(path: Path) -> float:
    from llm_quantize.calibration.windows import load_windows
    from llm_quantize.evaluation.perplexity import measure

    source = SourceModel.open(EMBEDDED_MODEL)
    asked = CalibrationConfig(data=str(EMBEDDED_HELDOUT), samples=8, seq_len=256, seed=1)
    windows = load_windows(asked, source.tokenizer, log=lambda line: None)
    return measure(source, path, windows.tokens, Device(CPU)).kl


@pytest.mark.readers
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("method", "name", "words"), REAL, ids=[" ".join(each).strip() for each in REAL])
def test_library(method: str, name: str, words: str, runs: Runs, tmp_path: Path) -> None:
    """The library's file is of this model, and its divergence is more than that of this program's file of that kind."""
    out = tmp_path / "out"
    more = ["--calib_samples", "16", "--calib_seq_len", "64", "--eval_data", "off", "--device", "cpu"]
    assert MAIN[method](["--backend", name, *words.split(), *more, "--output_path", str(out)]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    library = registry.LIBRARIES[name]
    assert report["versions"][library.distribution] == library.version
    for path in out.glob("*.json"):  # nothing of where it was made
        assert tempfile.gettempdir() not in path.read_text()
        assert str(EMBEDDED_MODEL) not in path.read_text()
    native: Finished = runs(method, *words.split(), "--format", method, "--calib_seq_len", "64")
    theirs, ours = _measured(out), _measured(native.path)
    assert ours < theirs < AT_MOST[report["bits"]]
