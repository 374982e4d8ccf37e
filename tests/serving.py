"""What the serving tests share: checkpoints to serve, what they should answer, and a server's life."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

import awq_quantize
import gptq_quantize
from reference import plain_model

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_vllm.sh"

Kind = Literal["awq", "gptq", "compressed-tensors"]
KINDS: tuple[Kind, ...] = ("awq", "gptq", "compressed-tensors")

# --- checkpoints


def make_checkpoint(kind: Kind, out_dir: Path) -> Path:
    """The embedded model at 4 bits, in the layout `kind`, as a user's command writes it but for less calibration.

    `awq`; `gptq`, symmetric, by name and so with the tied head's copy; `compressed-tensors`, asymmetric GPTQ.
    """
    short = ["--calib_samples", "16", "--quality", "fast", "--eval_data", "off", "--quiet"]
    command = ["--output_path", str(out_dir), *short]
    if kind == "awq":
        code = awq_quantize.main([*command, "--group_size", "128"])
    elif kind == "gptq":
        code = gptq_quantize.main([*command, "--group_size", "32", "--format", "gptq"])
    else:
        code = gptq_quantize.main([*command, "--group_size", "64", "--sym", "false"])
    assert code == 0
    config = json.loads((out_dir / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == kind
    return out_dir


def reference_model(directory: Path) -> PreTrainedModel:
    """The float32 model that the checkpoint in `directory` stands for, read by the tests' own slow unpackers."""
    return plain_model(directory)


# --- a server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running `run_vllm.sh`, asked over HTTP on loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, key: str | None) -> None:
        self.process, self.port, self.log, self.key = process, port, log, key

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str | None = None) -> tuple[int, Any]:
        """The HTTP status and the JSON of the answer; status 0 where nothing answers yet."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = int(answer.status), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        except OSError:
            return 0, None
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode(errors="replace")

    def complete(self, **body: Any) -> dict[str, Any]:
        """The first choice of a completion."""
        status, answer = self.ask("/v1/completions", body, self.key)
        assert status == 200, answer
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def wait_until_healthy(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.ask("/health")[0] != 200:
            tail = self.log.read_text(errors="replace")[-4000:]
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{tail}"
            assert time.monotonic() < end, f"the server is not healthy after {seconds:.0f} s:\n{tail}"
            time.sleep(0.25)

    def stop(self) -> int:
        """Ends the server as a service manager would, then by force what is left of its group; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(10)


@contextmanager
def running(
    model: str, *arguments: str, cwd: Path, log: Path, key: str | None = None, healthy_within: float = 900
) -> Iterator[Server]:
    """`run_vllm.sh model` from the directory `cwd` on a free port, healthy; stopped by its id on every way out.

    The first start on a machine installs vLLM, hence the long wait.
    """
    port = free_port()
    # The CPU build on every machine, none that happens to be set up, and no word to anyone.
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM", "VLLM_API_KEY", "HF_HUB_OFFLINE")}
    environment |= {"LLM_QUANTIZE_DEVICE": "cpu", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if key is not None:
        environment["VLLM_API_KEY"] = key
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(SCRIPT), model, "--port", str(port), *arguments],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(process, port, log, key)
        try:
            server.wait_until_healthy(healthy_within)
            yield server
        finally:
            server.stop()
