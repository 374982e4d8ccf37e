"""Makes checkpoints to serve, reads the model that a checkpoint holds, and runs a server: for the serving tests."""

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

Format = Literal["awq", "gptq", "compressed-tensors"]
FORMATS: tuple[Format, ...] = ("awq", "gptq", "compressed-tensors")

# --- checkpoints


def make_checkpoint(format_: Format, out_dir: Path) -> Path:
    """Quantize the embedded model to 4 bits in `format_` into `out_dir`, which is returned.

    The commands are a user's, with less calibration. The gptq checkpoint is symmetric and holds a copy of the tied
    head, as the command writes it where that format is asked for; the compressed-tensors one is asymmetric GPTQ.
    """
    short = ["--calib_samples", "16", "--quality", "fast", "--eval_data", "off", "--quiet"]
    command = ["--output_path", str(out_dir), *short]
    if format_ == "awq":
        code = awq_quantize.main([*command, "--group_size", "128"])
    elif format_ == "gptq":
        code = gptq_quantize.main([*command, "--group_size", "32", "--format", "gptq"])
    else:
        code = gptq_quantize.main([*command, "--group_size", "64", "--sym", "false"])
    assert code == 0
    config = json.loads((out_dir / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == format_
    return out_dir


def reference_model(directory: Path) -> PreTrainedModel:
    """Return the float32 model of the de-quantized checkpoint in `directory`, read by the tests' own unpackers."""
    return plain_model(directory)


# --- a server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running `run_vllm.sh`, with requests to it over HTTP on loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path, key: str | None) -> None:
        self.process, self.port, self.log, self.key = process, port, log, key

    def request(
        self, path: str, body: dict[str, Any] | None = None, key: str | None = None
    ) -> tuple[int, Any]:
        """Return the HTTP status and the JSON of the answer; status 0 where nothing answers yet.

        With a `body` the request is a POST of its JSON; `key` is the API key to send.
        """
        message = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
        try:
            with urllib.request.urlopen(message, timeout=60) as answer:
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
        """Return the first choice of the completion that `body` asks for."""
        status, answer = self.request("/v1/completions", body, self.key)
        assert status == 200, answer
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def wait_until_healthy(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.request("/health")[0] != 200:
            tail = self.log.read_text(errors="replace")[-4000:]
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{tail}"
            assert time.monotonic() < end, f"the server is not healthy after {seconds:.0f} s:\n{tail}"
            time.sleep(0.25)

    def stop(self) -> int:
        """Stop the server by SIGTERM, as a service manager does, and return its exit code.

        After at most 30 s what is left of its process group is killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(10)


@contextmanager
def running_server(
    model: str, *arguments: str, cwd: Path, log: Path, key: str | None = None, healthy_within: float = 900
) -> Iterator[Server]:
    """Run `run_vllm.sh model` in the directory `cwd` on a free port; yield the server once it is healthy.

    The server is stopped at the end, whatever happens. The first start on a machine installs vLLM, which takes
    minutes: `healthy_within` is in seconds.
    """
    port = free_port()
    # Every machine uses the script's own CPU build, and sends no statistics.
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
