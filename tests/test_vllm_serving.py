"""Tests that vLLM, started by `run_vllm.sh`, answers as the de-quantized weights do in plain PyTorch.

Starts vLLM's CPU build once for each format; the script installs it on its first start.
"""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_quantize.io.embedded_files import EMBEDDED_MODEL
from serving import FORMATS, Format, Server, make_checkpoint, reference_model, running_server

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        platform.machine() == "x86_64" and not torch.cpu._is_avx512_supported(),
        reason="vLLM's CPU build multiplies 4-bit integers (cpu_gemm_wna16) by AVX-512 alone",
    ),
]

TOLERANCE = 0.02  # nats; vLLM computes in half precision and the reference model in float32
NEW_TOKENS = 16
KEY = "open sesame"

# The --quantization that a user types for each format. Asymmetric GPTQ is stored as compressed-tensors, so the script
# has to replace the user's gptq.
QUANTIZATION_FLAG: dict[Format, str] = {"awq": "awq", "gptq": "gptq", "compressed-tensors": "gptq"}


@dataclass
class Served:
    """A server of a checkpoint in `format_` under the model `name`, and a prompt as token ids.

    `reference` is the de-quantized checkpoint in float32, `source` the model before quantization.
    """

    format_: Format
    server: Server
    name: str
    prompt: list[int]
    reference: Any
    source: Any

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """Return the reference model's log probabilities of the token after each of `tokens`: (n, vocabulary)."""
        return log_probabilities(self.reference, tokens)


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)


@pytest.fixture(scope="module", params=FORMATS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve each format from another directory than the project's, under a relative path with spaces."""
    format_: Format = request.param
    elsewhere = tmp_path_factory.mktemp("serving")
    directory = make_checkpoint(format_, elsewhere / "my models" / f"tiny {format_}")
    name = f"./my models/tiny {format_}"
    log = elsewhere / "log"
    arguments = ["--quantization", QUANTIZATION_FLAG[format_], "--max-model-len", "512"]
    with running_server(name, *arguments, cwd=elsewhere, log=log, key=KEY) as server:
        prompt = AutoTokenizer.from_pretrained(directory)("The function returns a list of").input_ids
        source = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        yield Served(format_, server, name, prompt, reference_model(directory), source)
        assert server.stop() == 0, "SIGTERM reaches vLLM, which ends cleanly"


def test_greedy_tokens_and_log_probabilities_equal_the_reference(served: Served) -> None:
    choice = served.server.complete(
        model=served.name,
        prompt=served.prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=5,
        ignore_eos=True,
        return_tokens_as_token_ids=True,
    )
    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    assert len(tokens) == NEW_TOKENS
    context = [*served.prompt, *tokens[:-1]]
    expected = served.expected(context)[len(served.prompt) - 1 :]
    decided = 0
    for step, token in enumerate(tokens):
        row = expected[step]
        best, second = row.topk(2).values.tolist()
        decided += best - second > TOLERANCE
        # The token is the reference model's best, or ties with it.
        assert row[token].item() >= best - TOLERANCE, f"step {step}"
        top = choice["logprobs"]["top_logprobs"][step]
        assert len(top) >= 5
        for other, value in top.items():
            index = int(other.removeprefix("token_id:"))
            assert value == pytest.approx(row[index].item(), abs=TOLERANCE), f"step {step}, token {index}"
    # The comparison is meaningful only if ties are few and the source model would not pass it.
    assert decided >= NEW_TOKENS - 4
    original = log_probabilities(served.source, context)[len(served.prompt) - 1 :]
    chosen = torch.tensor(tokens)[:, None]
    assert (original - expected).gather(1, chosen).abs().max() > 2 * TOLERANCE


def test_prompt_log_probabilities_equal_the_reference(served: Served) -> None:
    prompt = (served.prompt * 20)[:100]  # long enough that vLLM uses its kernels for many tokens
    choice = served.server.complete(
        model=served.name, prompt=prompt, max_tokens=1, temperature=0, prompt_logprobs=3
    )
    entries = choice["prompt_logprobs"]
    expected = served.expected(prompt)
    assert entries[0] is None
    assert len(entries) == len(prompt)
    for position, entry in enumerate(entries[1:], start=1):
        assert str(prompt[position]) in entry
        for token, found in entry.items():
            value = expected[position - 1, int(token)].item()
            assert found["logprob"] == pytest.approx(value, abs=TOLERANCE), f"position {position}"


def test_method_of_the_file_is_served_and_a_replaced_flag_reported(served: Served) -> None:
    log = served.server.log.read_text(errors="replace")
    assert re.search(rf"quantization=(auto_)?{served.format_}\b", log)
    said = "passing --quantization compressed-tensors in place of gptq" in log
    assert said == (served.format_ == "compressed-tensors")


def test_api_key_of_the_environment_is_required(served: Served) -> None:
    body = {"model": served.name, "prompt": "a", "max_tokens": 1}
    assert served.server.request("/v1/completions", body)[0] == 401
    assert served.server.request("/v1/completions", body, "another")[0] == 401
    assert served.server.request("/v1/completions", body, KEY)[0] == 200


def test_server_listens_on_loopback_only(served: Served) -> None:
    # All of 127.0.0.0/8 is this machine, so a server bound to all addresses would answer on 127.0.0.2.
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", served.server.port)) != 0
    with socket.socket() as ours:
        ours.settimeout(5)
        assert ours.connect_ex(("127.0.0.1", served.server.port)) == 0


def test_text_prompt_returns_text(served: Served) -> None:
    directory: Path = served.server.log.parent / served.name
    choice = served.server.complete(
        model=served.name, prompt="The function returns", max_tokens=8, temperature=0, ignore_eos=True
    )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The function returns").input_ids
    tokens: list[int] = []
    for _ in range(8):
        tokens.append(int(served.expected([*ids, *tokens])[-1].argmax()))
    expected = tokenizer.decode([*ids, *tokens], skip_special_tokens=True)
    assert "The function returns" + choice["text"] == expected
