"""How far a quantized checkpoint is from its source, read from the saved files.

    evaluate.py SOURCE QUANTIZED             perplexity of both, KL divergence, same likeliest token
    evaluate.py SOURCE --compare A B ...     several checkpoints of one source side by side

Both models are streamed block by block, so that it runs wherever the quantizer ran.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from llm_quantize.calibration.windows import load_windows, longest_window
from llm_quantize.checkpoint.reader import QuantizedCheckpoint, dequantized
from llm_quantize.config import EMBEDDED_HELDOUT, CalibrationConfig, QuantizeConfig
from llm_quantize.console import Console
from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.hub import resolve_model
from llm_quantize.model import block_forward
from llm_quantize.model.source import HEAD_NAMES, Source

EVAL_SEQ_LEN = 512
LOGIT_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # memory for logits and what is computed of them
LEAST_LOGIT_BYTES = 8 << 20  # less would not help
_COPIES = 8  # float32 values of vocabulary width that a token needs at the worst moment


@dataclass(frozen=True, slots=True)
class Measured:
    """`tokens` predicted; `perplexity_*` of each model; `kl`: mean KL(source || quantized), nats a token;
    `agreement`: share of tokens where both find the same one likeliest."""

    tokens: int
    perplexity_source: float
    perplexity_quantized: float
    kl: float
    agreement: float


class QuantizedSource(Source):
    """A quantized directory as a `Source` of de-quantized weights, on a skeleton of its own.

    Everything comes from its files: norms and biases too, which AWQ changes. Errors: `InputError`.
    """

    what = "quantized checkpoint"

    def __init__(self, source: Source, directory: Path) -> None:
        self.saved: QuantizedCheckpoint = dequantized(directory)
        skeleton = copy.deepcopy(source.skeleton)
        super().__init__(directory, source.config, skeleton, source.tokenizer, self.saved.files)

    def read(self, stored: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor; the weight of a quantized linear in float32. Errors: `WorkError`."""
        return self.saved.read(stored, device)

    def _weights_dtype(self, stored: str) -> torch.dtype:
        return torch.float32  # without unpacking it

    def prefetch(self, index: int, device: torch.device) -> None:
        """As of any `Source`; what is read ahead are the packed tensors."""
        if index < len(self.blocks):
            self.saved.prefetch(self.stored_name(f"{self.blocks[index]}."), device)


# -- measuring


@torch.no_grad()
def measure(
    source: Source,
    quantized: Path,
    tokens: Tensor,
    device: torch.device,
    *,
    on_block: Callable[[int], None] | None = None,
    logit_bytes: int | None = None,
) -> Measured:
    """Compares the checkpoint `quantized` with `source` on `tokens`, int64 (windows, length of 2 or more).

    Computes in float32 on the CPU, in the source's dtype elsewhere, log-probabilities in float32 always.
    `on_block(index)` is called after each block; `logit_bytes` bounds what logits take. Errors: `InputError`
    for a directory that is no checkpoint of this model, `WorkError` for damaged files and values that are not
    finite.
    """
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise InputError("held-out text needs one window of at least 2 tokens")
    dtype = torch.float32 if device.type == "cpu" else source.dtype
    models = [source, QuantizedSource(source, quantized)]
    if len(models[1].blocks) != len(source.blocks):
        raise InputError(f"{quantized} has another number of blocks than its source: is it of another model?")
    for model in models:
        model.prefetch(0, device)
    storage = _home(source, tokens, device, dtype)
    widest = max(max(linear.in_features, linear.out_features) for linear in source.linears(0))
    entered = [block_forward.embed(model, tokens, storage, device, dtype) for model in models]
    batch = block_forward.MicroBatch(device, tokens.shape[1], widest)
    for index, name in enumerate(source.blocks):
        for model, (states, calls) in zip(models, entered, strict=True):
            block = model.modules[index]
            model.load(block, name, device, dtype)
            model.prefetch(index + 1, device)
            block_forward.replay(block, name, states, calls.kwargs[index], batch)
            model.release(block)
        if on_block is not None:
            on_block(index)
    limit = logit_bytes or LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"])
    while True:
        try:
            return _compare(models, [states for states, _ in entered], tokens, device, dtype, limit)
        except torch.cuda.OutOfMemoryError:
            if limit < LEAST_LOGIT_BYTES:
                raise
        limit //= 4
        torch.cuda.empty_cache()


def _home(source: Source, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> torch.device:
    """Where the states of both models live: on the device where they take little of it, or host memory."""
    if device.type != "cuda":
        return device
    width = source.skeleton.get_input_embeddings().weight.shape[1]
    needed = 2 * tokens.numel() * width * dtype.itemsize
    return device if needed < torch.cuda.mem_get_info(device)[0] / 4 else torch.device("cpu")


def _compare(
    models: list[Source],
    states: list[block_forward.States],
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    limit: int,
) -> Measured:
    """The numbers, from the last states of source and quantized model, a few tokens at a time."""
    windows, predicted = tokens.shape[0], tokens.shape[1] - 1
    embeddings = models[0].skeleton.get_output_embeddings() or models[0].skeleton.get_input_embeddings()
    chunk = max(1, limit // (embeddings.weight.shape[0] * 4 * _COPIES))
    # Whole windows where they fit, else pieces of one: never longer than a window, which models may not take.
    step, piece = max(1, chunk // predicted), min(chunk, predicted)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with (
        block_forward.head(models[0], device, dtype) as first,
        block_forward.head(models[1], device, dtype) as second,
    ):
        for start in range(0, windows, step):
            stop = min(start + step, windows)
            hidden = [each.get(start, stop) for each in states]
            targets = tokens[start:stop, 1:].to(device)
            for a in range(0, predicted, piece):
                b = min(a + piece, predicted)
                p = torch.log_softmax(first(hidden[0][:, a:b]).float(), dim=-1)
                q = torch.log_softmax(second(hidden[1][:, a:b]).float(), dim=-1)
                target = targets[:, a:b, None]
                totals[0] -= p.gather(2, target).sum(dtype=torch.float64)
                totals[1] -= q.gather(2, target).sum(dtype=torch.float64)
                totals[3] += (p.argmax(-1) == q.argmax(-1)).sum()
                # In place: (log p - log q) * p. What the source holds for impossible counts for nothing.
                q = p.sub(q).mul_(p.exp_()).masked_fill_(p == 0, 0)
                totals[2] += q.sum(-1).sum(dtype=torch.float64)
    count = windows * predicted
    loss_source, loss_quantized, kl, agreement = (totals / count).tolist()
    if not all(map(math.isfinite, (loss_source, loss_quantized, kl))):
        raise WorkError("the logits are not finite: measure with --device cpu, which computes in float32")
    # Rounding may leave a hair below zero.
    return Measured(count, _exp(loss_source), _exp(loss_quantized), max(kl, 0.0), agreement)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


# -- text


def heldout_windows(config: QuantizeConfig, tokenizer: Any, log: Callable[[str], None]) -> Tensor:
    """Token windows, int64 (n, length), that calibration does not use; `config.eval_data` says of what.

    `auto` is the held-out text that ships beside the embedded model, for other models too. Errors:
    `InputError`, as in `calibration`.
    """
    calibration = config.calibration
    data = config.eval_data
    if data == "auto":
        data = str(EMBEDDED_HELDOUT)
        if not config.embedded:
            log("measured on the short neutral text that ships with this program: --eval_data takes yours")
    elif data == calibration.data:
        log(f"{data} is the calibration data too: what is measured may be better than on text never seen")
    asked = replace(
        calibration,
        data=data,
        samples=config.eval_samples,
        seq_len=min(calibration.seq_len, EVAL_SEQ_LEN),
        column=calibration.column if data == calibration.data else None,
        seed=(calibration.seed + 1) % 2**32,
    )
    return _windows(asked, tokenizer, log, "--calib_")


def _windows(config: CalibrationConfig, tokenizer: Any, log: Callable[[str], None], flags: str) -> Tensor:
    """`load_windows` in the words of measuring; `flags`: how the command's options begin."""

    def said(line: str) -> str:
        line = line.replace("too little text to calibrate on", "too little held-out text")
        return line.replace("calibration: ", "held-out text: ").replace("--calib_", flags)

    try:
        return load_windows(config, tokenizer, log=lambda line: log(said(line))).tokens
    except InputError as error:
        raise InputError(said(str(error))) from None


def sample(
    quantized: Path, tokenizer: Any, device: torch.device, prompt: str, max_new_tokens: int = 40
) -> str:
    """`prompt` and its greedy continuation by the saved checkpoint, which is held in memory as a whole.

    For small models. Errors: `WorkError` where tensors are missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    saved = dequantized(quantized)
    config = AutoConfig.from_pretrained(quantized, trust_remote_code=False)
    del config.quantization_config
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.float16
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype)
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]

    def renamed(name: str) -> str:
        """The model's name of a stored tensor: the output head has had several."""
        first, _, rest = name.partition(".")
        return f"{heads[0]}.{rest}" if heads and first in HEAD_NAMES else name

    left = model.load_state_dict({renamed(name): saved.read(name) for name in saved.files}, strict=False)
    model.tie_weights()
    missing = set(left.missing_keys) - set(getattr(model, "all_tied_weights_keys", None) or {})
    # AutoGPTQ's files hold biases of zeros for linears that have none.
    biases = {f"{linear}.bias" for linear in saved.linears}
    unexpected = [n for n in left.unexpected_keys if not (n in biases and not bool(saved.read(n).any()))]
    if missing or unexpected:
        raise WorkError(f"{quantized}: tensor {min([*missing, *unexpected])} is missing or left over")
    model.to(device).eval()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=device)
    end = tokenizer.eos_token_id
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
        )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


# -- on its own


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = _Parser(
        prog="evaluate.py",
        description="Measure quantized checkpoints against their source.",
        epilog="Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="the model before: a local directory or a hub id")
    parser.add_argument("quantized", metavar="QUANTIZED", nargs="?", type=Path, help="quantized directory")
    parser.add_argument(
        "--compare", metavar="DIR", nargs="+", type=Path, default=[], help="several of them, side by side"
    )
    parser.add_argument(
        "--data",
        default="auto",
        help="held-out text: auto for the one that ships with this program, wikitext, c4, a hub id, a local "
        "file (default: auto)",
    )
    parser.add_argument("--column", metavar="NAME", help="column that holds the text, where it is not found")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="windows of text (default: 16)")
    parser.add_argument(
        "--seq_len",
        type=int,
        metavar="N",
        help=f"tokens a window (default: {EVAL_SEQ_LEN}, or what the model takes)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="draws the windows (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code of SOURCE")
    return parser


def pick_device(asked: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that is there. Errors: `InputError`."""
    kind, _, number = asked.partition(":")
    if asked not in ("auto", "cpu") and (kind != "cuda" or (":" in asked and not number.isdecimal())):
        raise InputError(f"--device {asked}: take auto, cpu, cuda or cuda:N")
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"--device {asked}: no GPU that PyTorch can use; take --device cpu, or check the driver"
        )
    if int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", int(number or 0))


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    checkpoints: list[Path] = ([args.quantized] if args.quantized else []) + args.compare
    if not checkpoints:
        raise InputError("no quantized checkpoint: give its directory, or several after --compare")
    for path in checkpoints:
        if not path.is_dir():
            raise InputError(f"no such directory: {path}")
        dequantized(path)  # before anything long
    for flag, value, least in (("samples", args.samples, 1), ("seq_len", args.seq_len or 2, 2)):
        if value < least or args.seq_len == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: at least {least}")
    device = pick_device(args.device)
    directory = resolve_model(args.source, trust_remote_code=args.trust_remote_code, log=console.note)
    source = Source.open(directory, trust_remote_code=args.trust_remote_code)
    text = source.config.get_text_config()
    longest = longest_window(source.tokenizer, getattr(text, "max_position_embeddings", None))
    if args.seq_len and longest and args.seq_len > longest:
        raise InputError(f"--seq_len {args.seq_len} is more than the model takes: at most {longest}")
    asked = CalibrationConfig(
        data=str(EMBEDDED_HELDOUT) if args.data == "auto" else args.data,
        samples=args.samples,
        seq_len=args.seq_len or min(EVAL_SEQ_LEN, longest or EVAL_SEQ_LEN),
        column=args.column,
        seed=args.seed,
    )
    tokens = _windows(asked, source.tokenizer, console.warn, "--")
    results = []
    with console.blocks(len(source.blocks) * len(checkpoints)) as progress:
        for path in checkpoints:
            results.append(measure(source, path, tokens, device, on_block=lambda _: progress.advance()))
    sizes = [
        sum(file.stat().st_size for file in set(dequantized(path).files.values())) for path in checkpoints
    ]
    if args.json:
        rows = [
            {"checkpoint": str(path), "bytes": size, **asdict(result)}
            for path, size, result in zip(checkpoints, sizes, results, strict=True)
        ]
        print(json.dumps({"source": args.source, "data": args.data, "seed": args.seed, "results": rows}))
        return
    print(_table(checkpoints, sizes, results))


def _table(checkpoints: list[Path], sizes: list[int], results: list[Measured]) -> str:
    rows = [("checkpoint", "MiB", "perplexity", "KL divergence", "same token")]
    rows.append(("(source)", "", f"{results[0].perplexity_source:.3f}", "", ""))
    for path, size, result in zip(checkpoints, sizes, results, strict=True):
        ppl, same = f"{result.perplexity_quantized:.3f}", f"{100 * result.agreement:.2f} %"
        rows.append((str(path), f"{size / 2**20:,.1f}", ppl, f"{result.kl:.5f}", same))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), f"over {results[0].tokens:,} tokens"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code; --help and wrong arguments leave by SystemExit."""
    for key, quiet in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ.setdefault(key, quiet)
    args = build_parser().parse_args(argv)
    console = Console(quiet=args.json)
    debug = os.environ.get("LLM_QUANTIZE_DEBUG", "0") not in ("", "0")
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        try:
            _evaluate(args, console)
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            code, line = (
                1,
                f"{type(error).__name__}: {error} (run with LLM_QUANTIZE_DEBUG=1 for the traceback)",
            )
            if isinstance(error, InputError | WorkError):
                code, line = error.exit_code, str(error)
            elif isinstance(error, KeyboardInterrupt):
                code, line = 130, "interrupted before the end"
            elif isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
                line = "out of memory: lower --seq_len, or take --device cpu"
            console.error(line, "evaluate.py")
            return code
    return 0
