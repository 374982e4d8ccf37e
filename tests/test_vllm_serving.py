"""A real vLLM, started by `run_vllm.sh`, answers as the de-quantized weights do in plain PyTorch.

Starts vLLM's CPU build once for each layout that it serves; the script installs it on its first start.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_quantize.config import EMBEDDED_MODEL
from serving import KINDS, Kind, Server, make_checkpoint, reference_model, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

TOLERANCE = 0.02  # nats: activations are half precision there and float32 here
NEW_TOKENS = 16
KEY = "open sesame"

# What a user types for each, as the quantizers print it. Asymmetric GPTQ is stored as compressed-tensors: the
# script has to pass that name on in place of the user's.
FLAG: dict[Kind, str] = {"awq": "awq", "gptq": "gptq", "compressed-tensors": "gptq"}


@dataclass
class Served:
    """A server, the model name it goes by, what it serves and what it should answer like."""

    kind: Kind
    server: Server
    name: str
    prompt: list[int]
    reference: Any
    source: Any

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """Log probabilities of the token that follows each of `tokens` (n) by the reference: (n, vocabulary)."""
        return log_probabilities(self.reference, tokens)


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits.log_softmax(-1)


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each layout served from another directory, under a relative path with spaces."""
    kind: Kind = request.param
    elsewhere = tmp_path_factory.mktemp("serving")
    directory = make_checkpoint(kind, elsewhere / "my models" / f"tiny {kind}")
    name = f"./my models/tiny {kind}"
    log = elsewhere / "log"
    arguments = ["--quantization", FLAG[kind], "--max-model-len", "512"]
    with running(name, *arguments, cwd=elsewhere, log=log, key=KEY) as server:
        prompt = AutoTokenizer.from_pretrained(directory)("The function returns a list of").input_ids
        source = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        yield Served(kind, server, name, prompt, reference_model(directory), source)
        assert server.stop() == 0, "SIGTERM reaches vLLM, which ends cleanly"


def test_greedy_tokens_and_their_probabilities_are_those_of_the_dequantized_weights(served: Served) -> None:
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
        # The reference's best token, or one that ties with it.
        assert row[token].item() >= best - TOLERANCE, f"step {step}"
        top = choice["logprobs"]["top_logprobs"][step]
        assert len(top) >= 5
        for other, value in top.items():
            index = int(other.removeprefix("token_id:"))
            assert value == pytest.approx(row[index].item(), abs=TOLERANCE), f"step {step}, token {index}"
    # The comparison means something: few ties, and the source model would not have passed.
    assert decided >= NEW_TOKENS - 4
    original = log_probabilities(served.source, context)[len(served.prompt) - 1 :]
    chosen = torch.tensor(tokens)[:, None]
    assert (original - expected).gather(1, chosen).abs().max() > 2 * TOLERANCE


def test_probabilities_of_the_prompt_agree_too(served: Served) -> None:
    prompt = (served.prompt * 20)[:100]  # long enough for the kernels that take many tokens at once
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


def test_it_serves_the_method_of_the_file_and_says_where_the_flag_differs(served: Served) -> None:
    log = served.server.log.read_text(errors="replace")
    assert re.search(rf"quantization=(auto_)?{served.kind}\b", log)
    said = "passing --quantization compressed-tensors in place of gptq" in log
    assert said == (served.kind == "compressed-tensors")


def test_the_key_of_the_environment_is_asked_for(served: Served) -> None:
    body = {"model": served.name, "prompt": "a", "max_tokens": 1}
    assert served.server.ask("/v1/completions", body)[0] == 401
    assert served.server.ask("/v1/completions", body, "another")[0] == 401
    assert served.server.ask("/v1/completions", body, KEY)[0] == 200


def test_it_listens_on_loopback_alone(served: Served) -> None:
    # The whole of 127.0.0.0/8 is this machine: a server bound to all addresses would answer on 127.0.0.2.
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", served.server.port)) != 0
    with socket.socket() as ours:
        ours.settimeout(5)
        assert ours.connect_ex(("127.0.0.1", served.server.port)) == 0


def test_a_text_prompt_gets_text(served: Served) -> None:
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
