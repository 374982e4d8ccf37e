#!/usr/bin/env python3
"""Rebuilds the embedded model, and larger ones of other families, from freely licensed text.

    build.py corpus --out DIR [--text DIR ...]            text -> train, calibration and heldout documents
    build.py train --corpus DIR --preset tiny --out DIR   documents -> tokenizer, trained model, side files
    build.py                                              both, for the model that ships beside this script

The text is prose of the running Python's standard library (docstrings, block comments, the topics of
`help()`; PSF licence) and of any folder given by `--text`. No network is used. This script knows nothing
about quantization, but for one number at the end: how much plain rounding to 4 bits hurts the model.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html.parser
import json
import math
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "calibration", "heldout", "heldout_other")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MAX_SHARD_SIZE = "15MB"


# ------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, slots=True)
class Document:
    """One module's docstrings, one help topic or one page: the unit that a split never divides."""

    source: str
    text: str


def prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences: no code, tables, signatures or lists of names."""
    words = paragraph.split()
    if len(words) < 5 or ">>>" in paragraph or "====" in paragraph or "----" in paragraph:
        return False
    plain = sum(bool(re.fullmatch(r"[(\"'`*]*[A-Za-z]+(?:['’-][A-Za-z]+)*[)\"'`*.,;:!?]*", w)) for w in words)
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    english = sum(c.isascii() for c in paragraph) >= 0.98 * len(paragraph)
    return english and plain >= 0.65 * len(words) and letters >= 0.85 * len(paragraph)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of plain or reStructuredText prose, each unwrapped to one line; the rest is left out."""
    text = re.sub(r":[\w:+-]+:`~?!?([^`]+?)(?:\s*<[^`>]*>)?`", r"\1", text)  # roles: :func:`x` -> x
    text = re.sub(r"``([^`]+)``", r"\1", text)
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.strip() for line in block.splitlines()]
        # Directives, underlines of titles and borders of tables are markup, not sentences.
        lines = [line for line in lines if not re.match(r"\.\. |:\w[\w ]*:|[=~^\"*+#|-]{3,}", line)]
        paragraph = re.sub(r"\s+", " ", " ".join(lines)).strip()
        if prose(paragraph):
            yield paragraph


class _PageText(html.parser.HTMLParser):
    """Collects the paragraphs of a page; `paragraphs_found` holds them unfiltered."""

    SKIPPED_TAGS = frozenset({"head", "script", "style", "nav", "pre", "footer", "button", "svg", "select"})
    SKIPPED_CLASSES = frozenset(
        {"related", "sphinxsidebar", "footer", "headerlink", "navheader", "navfooter", "toc", "contents"}
        | {"toctree-wrapper", "highlight", "menu", "nosearch", "fancy_toc", "fancy-toc"}
    )
    INLINE_TAGS = frozenset(
        {"a", "abbr", "acronym", "b", "bdi", "big", "cite", "code", "del", "dfn", "em", "font", "i", "ins"}
        | {"kbd", "mark", "q", "s", "samp", "small", "span", "strong", "sub", "sup", "tt", "u", "var", "wbr"}
    )
    VOID_TAGS = frozenset(["area", "base", "br", "col", "hr", "img", "input", "link", "meta", "wbr"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs_found: list[str] = []
        self._parts: list[str] = []
        self._skipped_tag = ""  # the element being left out; nested ones of the same name are counted
        self._depth = 0

    def _flush(self) -> None:
        paragraph = re.sub(r"\s+", " ", "".join(self._parts)).replace("¶", "").strip()
        self._parts.clear()
        if paragraph:
            self.paragraphs_found.append(paragraph)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped_tag:
            self._depth += tag == self._skipped_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if (tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES) and tag not in self.VOID_TAGS:
            self._skipped_tag, self._depth = tag, 1
        if tag not in self.INLINE_TAGS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if self._skipped_tag:
            self._depth -= tag == self._skipped_tag
            if not self._depth:
                self._skipped_tag = ""
        elif tag not in self.INLINE_TAGS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._skipped_tag:
            self._parts.append(data)

    def close(self) -> None:
        super().close()
        self._flush()


def page_paragraphs(page: str) -> Iterator[str]:
    """Prose paragraphs of an HTML page, without navigation, code blocks and tables of contents."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    return (p for p in parser.paragraphs_found if prose(p))


def stdlib_documents() -> Iterator[Document]:
    """Docstrings and block comments of every module of the standard library, then the topics of `help()`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out & set(relative.parts):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, scopes)]
        for block in re.findall(r"(?:^[ \t]*#.*\n){2,}", source, re.MULTILINE):
            found.append(re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE))
        text = "\n\n".join(p for part in found for p in paragraphs(part))
        yield Document(f"stdlib/{relative.as_posix()}", text)
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"stdlib/topics/{name}", "\n\n".join(paragraphs(text)))


def folder_documents(folder: Path) -> Iterator[Document]:
    """Each .txt, .rst and .html file of a folder; a page comes before a text file of the same name."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder of text")
    files = {p for p in folder.rglob("*") if p.suffix in {".txt", ".rst", ".html"} and p.is_file()}
    for path in sorted(files):
        relative = path.relative_to(folder)
        copied = path.suffix != ".html" and path.with_suffix(".html") in files
        generated = path.stem in {"genindex", "genindex-all", "py-modindex", "search", "searchindex"}
        if copied or generated or any(part.startswith("_") for part in relative.parts):
            continue
        text = path.read_text("utf-8", errors="replace")
        found = page_paragraphs(text) if path.suffix == ".html" else paragraphs(text)
        yield Document(f"{folder.name}/{relative.as_posix()}", "\n\n".join(found))


def deduplicated(documents: Iterable[Document], seen: set[bytes], shortest: int = 200) -> Iterator[Document]:
    """Keeps the first occurrence of each paragraph, whatever its case, markup and punctuation.

    `seen` is filled on the way, so that a later call drops what an earlier one kept. Documents that end up
    with fewer than `shortest` characters are dropped, and their paragraphs stay free for others.
    """
    for document in documents:
        kept, keys = [], set()
        for paragraph in document.text.split("\n\n"):
            key = hashlib.sha256(re.sub(r"[^a-z0-9]+", "", paragraph.lower()).encode()).digest()
            if key not in seen and key not in keys:
                keys.add(key)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= shortest:
            seen |= keys
            yield Document(document.source, text)


def split_by_hash(
    documents: Iterable[Document], heldout_bytes: int, calibration_bytes: int
) -> dict[str, list[Document]]:
    """Whole documents in the order of their hash: heldout first, then calibration, the rest for training.

    A document of more than a quarter of a split's size goes past that split, so that none is a single page.
    """
    ordered = sorted(documents, key=lambda d: hashlib.sha256(d.text.encode()).digest())
    splits: dict[str, list[Document]] = {"train": [], "calibration": [], "heldout": []}
    room = {"heldout": heldout_bytes, "calibration": calibration_bytes}
    limit = {name: size // 4 for name, size in room.items()}
    for document in ordered:
        size = len(document.text.encode())
        name = next((n for n in room if room[n] > 0 and size <= limit[n]), "train")
        splits[name].append(document)
        if name in room:
            room[name] -= size
    return splits


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """JSON lines of `source` and `text`, compressed; the same documents give the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
        for document in documents:
            line = json.dumps({"source": document.source, "text": document.text}, ensure_ascii=False)
            file.write(line.encode() + b"\n")


def read_documents(path: Path) -> list[Document]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def plain_text(documents: Iterable[Document]) -> str:
    return "\n\n".join(d.text for d in documents) + "\n"


def stdlib_license() -> str:
    """The licence that covers the standard library's text: the file Python ships, else its notice."""
    for name in ("LICENSE.txt", "LICENSE"):
        path = Path(sysconfig.get_paths()["stdlib"]) / name
        if path.is_file():
            return path.read_text("utf-8", errors="replace")
    return f"{sys.copyright}\n\nPSF License Agreement, https://docs.python.org/3/license.html\n"


def build_corpus(
    out: Path,
    folders: Iterable[Path] = (),
    other_folders: Iterable[Path] = (),
    licenses: Iterable[str] = (),
    *,
    stdlib: bool = True,
    heldout_kb: int = 120,
    calibration_kb: int = 320,
) -> None:
    """Writes `{train,calibration,heldout}.jsonl.gz` and LICENSE; given other folders, `heldout_other` too."""

    def everything() -> Iterator[Document]:
        for folder in folders:
            yield from folder_documents(folder)
        if stdlib:
            yield from stdlib_documents()

    seen: set[bytes] = set()
    splits = split_by_hash(deduplicated(everything(), seen), heldout_kb * 1000, calibration_kb * 1000)
    others = (d for folder in other_folders for d in folder_documents(folder))
    other = split_by_hash(deduplicated(others, seen), heldout_kb * 1000, 0)["heldout"]
    if other:
        splits["heldout_other"] = other
    if not all(splits.values()):
        empty = [name for name, documents in splits.items() if not documents]
        raise SystemExit(f"too little prose for {', '.join(empty)}: give more by --text, or smaller splits")
    notice = [f"Text of {name}" for name in licenses]
    if stdlib:
        notice.append(f"Text of Python {sys.version.split()[0]}'s standard library:\n\n{stdlib_license()}")
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        write_documents(out / f"{name}.jsonl.gz", documents)
        size = sum(len(d.text.encode()) for d in documents)
        print(f"{name:14} {len(documents):5} documents {size / 1e6:7.2f} MB")
    (out / "LICENSE").write_text("\n\n".join(notice), "utf-8")


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A model's shape and how it is trained. Steps count for the GPU; `--minutes` bounds any machine."""

    model_type: str
    shape: dict[str, Any]
    vocab_size: int
    dtype: str
    steps: int
    tokens_per_step: int
    learning_rate: float


PRESETS = {
    "tiny": Preset(
        model_type="qwen2",
        shape={
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        vocab_size=2048,
        dtype="float16",
        steps=2000,
        tokens_per_step=8192,
        learning_rate=3e-3,
    ),
    "qwen2-30m": Preset(
        model_type="qwen2",
        shape={
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        vocab_size=8192,
        dtype="bfloat16",
        steps=1500,
        tokens_per_step=32768,
        learning_rate=2e-3,
    ),
    "llama-30m": Preset(
        model_type="llama",
        shape={
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 14,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        vocab_size=8192,
        dtype="bfloat16",
        steps=1500,
        tokens_per_step=32768,
        learning_rate=2e-3,
    ),
    "neox-30m": Preset(
        model_type="gpt_neox",
        shape={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 7,
            "num_attention_heads": 8,
            "tie_word_embeddings": False,
        },
        vocab_size=8192,
        dtype="float16",
        steps=1500,
        tokens_per_step=32768,
        learning_rate=1.5e-3,
    ),
}
MAX_POSITIONS = 2048
SHORT_WINDOW = 512
# The last part of a run has windows of MAX_POSITIONS, so that position encodings reach as far as they claim.
LONG_SHARE = 0.2


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; encoding puts BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Saves it under the class name that every release of transformers knows (5.x writes a new one)."""
    tokenizer.save_pretrained(str(out))
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 4 would add token_type_ids, which decoders do not take.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]) -> torch.Tensor:
    """Documents as one row of ids, int64 `(tokens,)`, each between BOS and EOS."""
    import torch

    encoded = tokenizer([d.text for d in documents], verbose=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)], dtype=torch.long)


def build_model(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A causal LM of the preset's shape with random FP32 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(
        preset.model_type,
        vocab_size=preset.vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **preset.shape,
    )
    model: PreTrainedModel = auto.from_config(config)
    return model


def learning_rate_at(progress: float, warm_up: float = 0.03, last: float = 0.02) -> float:
    """Factor of the peak learning rate: a linear warm-up, then half a cosine down to `last`."""
    if progress < warm_up:
        return max(progress / warm_up, 0.02)
    along = min((progress - warm_up) / (1 - warm_up), 1.0)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * along))


def mean_loss(model: PreTrainedModel, stream: torch.Tensor, window: int = MAX_POSITIONS) -> float:
    """Cross entropy, nats per token, over consecutive windows of a stream `(tokens,)`."""
    import torch
    from torch.nn import functional

    window = min(window, len(stream) - 1)
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream) - window, window):
            piece = stream[start : start + window + 1].to(device)[None]
            logits = model(input_ids=piece[:, :-1], use_cache=False).logits
            total += functional.cross_entropy(logits[0].float(), piece[0, 1:], reduction="sum").item()
            count += window
    return total / count


def round_to_nearest(model: PreTrainedModel, bits: int = 4, group_size: int = 128) -> None:
    """Rounds every linear of the blocks to the asymmetric min-max grid of its groups, in place."""
    import torch

    for name, module in model.base_model.named_modules():  # without the head
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.data
        if weight.shape[1] % group_size:
            raise ValueError(f"{name}: width {weight.shape[1]} is no multiple of {group_size}")
        groups = weight.float().reshape(weight.shape[0], -1, group_size)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
        zero = torch.round(-low / scale)
        integers = torch.clamp(torch.round(groups / scale) + zero, 0, 2**bits - 1)
        module.weight.data = ((integers - zero) * scale).reshape(weight.shape).to(weight.dtype)


def train_model(
    model: Any,
    stream: torch.Tensor,
    validation: torch.Tensor,
    preset: Preset,
    *,
    minutes: float | None,
    seed: int,
    device: torch.device,
    compiled: bool,
) -> int:
    """Trains in place on random windows of a stream `(tokens,)`; returns the number of steps taken.

    AdamW, a cosine schedule with warm-up, BF16 autocast on CUDA. Ends after the preset's steps or after
    `minutes`: the schedule follows whichever is further along. The same seed draws the same windows.
    """
    import torch
    from torch.nn import functional

    on_cuda = device.type == "cuda"
    model.to(device).train()
    stream = stream.to(device)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=preset.learning_rate,
        betas=(0.9, 0.95),
        fused=on_cuda,
    )
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    window, step, progress, report_at = SHORT_WINDOW, 0, 0.0, 0.0
    while progress < 1:
        window = MAX_POSITIONS if progress >= 1 - LONG_SHARE else SHORT_WINDOW
        window = min(window, len(stream) - 1)
        for group in optimizer.param_groups:
            group["lr"] = preset.learning_rate * learning_rate_at(progress)
        windows = max(preset.tokens_per_step // window, 1)
        starts = torch.randint(len(stream) - window, (windows,), generator=generator)
        batch = stream[starts.to(device)[:, None] + torch.arange(window + 1, device=device)]
        with torch.autocast(device.type, torch.bfloat16, enabled=on_cuda):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss: Any = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed = (time.perf_counter() - started) / 60
        progress = max(step / preset.steps, elapsed / minutes if minutes else 0.0)
        if progress >= report_at:
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss is not finite at step {step}: lower --learning_rate")
            model.eval()
            other = mean_loss(model, validation[: 16 * SHORT_WINDOW], SHORT_WINDOW)
            model.train()
            losses = f"train {loss.item():.3f}  unseen {other:.3f}"
            print(f"step {step:5}  {elapsed * 60:6.0f} s  window {window:4}  {losses}", flush=True)
            report_at = progress + 0.1 if progress < 0.9 else 1.0
    model.eval()
    return step


README = """---
license: {license_id}
language: en
library_name: transformers
---
# {name}

A causal language model of {parameters:.1f} million parameters ({model_type} architecture, {dtype} weights,
{vocab} byte-level BPE tokens, {positions} positions), trained from nothing by `embedded/build.py` for {steps}
steps on {train_mb:.1f} MB of documentation prose. It exists to try quantization out quickly: it writes words
and grammar, and knows nothing.

`calibration.txt` ({calibration_kb:.0f} kB, for calibration) and `heldout.txt` ({heldout_kb:.0f} kB, for
measuring) lie in this folder or in the one above. Both are documents that the model never saw in training,
and no paragraph is in two of them. Cross entropy on `heldout.txt`: {loss:.4f} nats per token (perplexity
{perplexity:.3f}); with the blocks' weights rounded to the nearest of 16 levels in groups of 128:
{rounded:.4f} ({rounded_perplexity:.3f}).

The text, and so what the model learned from it, is under the licences in `LICENSE`.
"""


def train(
    corpus: Path,
    out: Path,
    preset_name: str,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device_name: str = "auto",
    dtype_name: str | None = None,
    learning_rate: float | None = None,
    tokens_per_step: int | None = None,
    compiled: bool = False,
) -> dict[str, float]:
    """Documents of `build_corpus` -> a model folder. Returns the losses and counts that it prints.

    An existing `out` is replaced only once the new model is complete.
    """
    import torch
    from transformers import AutoModelForCausalLM

    preset = PRESETS[preset_name]
    preset = replace(
        preset,
        learning_rate=learning_rate or preset.learning_rate,
        tokens_per_step=tokens_per_step or preset.tokens_per_step,
        steps=steps or preset.steps,
    )
    missing = [name for name in SPLITS[:3] if not (corpus / f"{name}.jsonl.gz").is_file()]
    if missing:
        raise SystemExit(f"{corpus}: no {missing[0]}.jsonl.gz; make it by `build.py corpus --out {corpus}`")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise SystemExit(f"{out}: holds other files than a model; give another --out")
    paths = {name: corpus / f"{name}.jsonl.gz" for name in SPLITS}
    splits = {name: read_documents(path) for name, path in paths.items() if path.is_file()}
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_name)
    dtype: torch.dtype = getattr(torch, dtype_name or preset.dtype)
    torch.manual_seed(seed)

    tokenizer = train_tokenizer((d.text for d in splits["train"]), preset.vocab_size)
    if len(tokenizer) != preset.vocab_size:
        raise SystemExit(f"{corpus}: too little text for {preset.vocab_size} tokens (got {len(tokenizer)})")
    streams = {name: token_stream(tokenizer, documents) for name, documents in splits.items()}
    model: Any = build_model(preset, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = len(streams["train"])
    print(
        f"{preset_name}: {parameters / 1e6:.2f} M parameters, {tokens / 1e6:.2f} M tokens, {device}",
        flush=True,
    )
    started = time.perf_counter()
    taken = train_model(
        model,
        streams["train"],
        streams["calibration"],
        preset,
        minutes=minutes,
        seed=seed,
        device=device,
        compiled=compiled,
    )
    seconds = time.perf_counter() - started

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new = Path(scratch) / "model"
        model.to("cpu").to(dtype)
        model.config.dtype = dtype
        model.generation_config.max_new_tokens = 64
        model.save_pretrained(str(new), max_shard_size=MAX_SHARD_SIZE)
        save_tokenizer(tokenizer, new)
        for name in splits:
            if name != "train":
                (new / f"{name}.txt").write_text(plain_text(splits[name]), "utf-8")
        shutil.copyfile(corpus / "LICENSE", new / "LICENSE")

        # Everything below is measured on what was saved, not on what was trained.
        saved: Any = AutoModelForCausalLM.from_pretrained(str(new), dtype=torch.float32)
        saved.to(device).eval()
        results = {"parameters": parameters, "steps": taken, "seconds": seconds}
        results["heldout"] = mean_loss(saved, streams["heldout"])
        if "heldout_other" in streams:
            results["heldout_other"] = mean_loss(saved, streams["heldout_other"])
        prompt = tokenizer("The function returns", return_tensors="pt").to(device)
        written = saved.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            do_sample=False,
            max_new_tokens=48,
        )
        sample = tokenizer.decode(written[0], skip_special_tokens=True)
        round_to_nearest(saved)
        results["rounded"] = mean_loss(saved, streams["heldout"])
        sizes = {name: sum(len(d.text.encode()) for d in documents) for name, documents in splits.items()}
        only_stdlib = all(d.source.startswith("stdlib/") for ds in splits.values() for d in ds)
        text = README.format(
            license_id="psf-2.0" if only_stdlib else "other",
            name=f"{preset_name}-documentation",
            parameters=parameters / 1e6,
            model_type=preset.model_type,
            dtype=str(dtype).removeprefix("torch."),
            vocab=preset.vocab_size,
            positions=MAX_POSITIONS,
            steps=taken,
            train_mb=sizes["train"] / 1e6,
            calibration_kb=sizes["calibration"] / 1e3,
            heldout_kb=sizes["heldout"] / 1e3,
            loss=results["heldout"],
            perplexity=math.exp(results["heldout"]),
            rounded=results["rounded"],
            rounded_perplexity=math.exp(results["rounded"]),
        )
        (new / "README.md").write_text(text, "utf-8")
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)

    size = sum(p.stat().st_size for p in out.iterdir())
    print(f"{taken} steps in {seconds:.0f} s; {size / 1e6:.2f} MB in {out}")
    for name in ("heldout", "heldout_other", "rounded"):
        if name in results:
            print(f"{name:14} loss {results[name]:.4f}  perplexity {math.exp(results[name]):.3f}")
    print(f"greedy: {sample!r}")
    return results


# ------------------------------------------------------------------------------------------------ command


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="{corpus,train}")
    corpus = commands.add_parser("corpus", help="collect text and split it")
    add = corpus.add_argument
    add("--out", type=Path, required=True, help="folder for the documents")
    add("--text", type=Path, action="append", default=[], help="folder of .txt, .rst, .html to add")
    add("--other", type=Path, action="append", default=[], help="folder for heldout_other alone")
    add("--license", action="append", default=[], help="'WHOSE: LICENCE' of added text, for LICENSE")
    add("--no-stdlib", action="store_true", help="leave the standard library's text out")
    add("--heldout_kb", type=int, default=120, help="size of heldout (default: %(default)s)")
    add("--calibration_kb", type=int, default=320, help="size of calibration (default: %(default)s)")
    training = commands.add_parser("train", help="train and save a model")
    add = training.add_argument
    add("--corpus", type=Path, required=True, help="folder that `corpus` wrote")
    add("--out", type=Path, required=True, help="model folder; replaced at the end")
    add("--preset", choices=sorted(PRESETS), default="tiny", help="(default: %(default)s)")
    add("--steps", type=int, help="training steps (default: the preset's)")
    add("--minutes", type=float, help="end after this time, if that comes first")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add("--dtype", choices=["float16", "bfloat16"], help="of the saved weights")
    add("--learning_rate", type=float, help="peak (default: the preset's)")
    add("--tokens_per_step", type=int, help="(default: the preset's)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile: pays in long runs")
    args = parser.parse_args(argv)
    if args.command != "corpus":
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()

    if args.command == "corpus":
        build_corpus(
            args.out,
            args.text,
            args.other,
            args.license,
            stdlib=not args.no_stdlib,
            heldout_kb=args.heldout_kb,
            calibration_kb=args.calibration_kb,
        )
    elif args.command == "train":
        if (args.steps is not None and args.steps < 1) or (args.minutes is not None and args.minutes <= 0):
            parser.error("--steps and --minutes must be positive")
        train(
            args.corpus,
            args.out,
            args.preset,
            steps=args.steps,
            minutes=args.minutes,
            seed=args.seed,
            device_name=args.device,
            dtype_name=args.dtype,
            learning_rate=args.learning_rate,
            tokens_per_step=args.tokens_per_step,
            compiled=args.compile,
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            build_corpus(Path(folder))
            train(Path(folder), HERE / "model", "tiny")
        for name in ("calibration.txt", "heldout.txt"):
            (HERE / "model" / name).replace(HERE / name)  # text of the tool, not a file of the model
    return 0


if __name__ == "__main__":
    sys.exit(main())
