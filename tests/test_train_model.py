"""The recipe of the embedded model: the text it takes, how it is split, and what a short training leaves."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedded import build

SENTENCE = "The function returns the value that was found first in the list of its arguments."


def words(seed: int, count: int = 60) -> str:
    """Prose-like text from a small vocabulary, another for each seed."""
    draw = random.Random(seed)
    vocabulary = SENTENCE.lower().rstrip(".").split()
    return " ".join(draw.choice(vocabulary) for _ in range(count)) + "."


def folder_of_pages(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        text = "\n\n".join(words(1000 * index + k) for k in range(3))
        (folder / f"page{index}.txt").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    "paragraph",
    [
        ">>> print the value of the first thing in the list",
        "x = foo(bar, 3) + baz[i] * 2 if a_b else c_d",
        "See also foo",
        "| name | value | other | 12 | 13 | 14 | 15 | 16 |",
        "Это предложение написано совсем на другом языке и не годится.",
    ],
)
def test_what_is_not_prose_is_left_out(paragraph: str) -> None:
    assert not build.prose(paragraph)
    assert list(build.paragraphs(f"{SENTENCE}\n\n{paragraph}")) == [SENTENCE]


def test_wrapped_paragraphs_are_joined_and_markup_goes() -> None:
    text = ".. note::\n\nThe :func:`open` call returns a ``file``\n   object that can be read.\n=======\n"
    assert list(build.paragraphs(text)) == ["The open call returns a file object that can be read."]


def test_pages_lose_navigation_and_code_but_not_inline_markup() -> None:
    page = (
        "<html><head><title>The title of the page is not a part of it</title></head><body>"
        "<div class='related'><div>Go to the next page of this manual</div> and then to another one</div>"
        "<p>The <code>open</code> call &amp; its friends return a <a href='x'>file</a> to the caller.</p>"
        "<pre>this is code and not a sentence for the model</pre>"
        "<p>Unclosed paragraphs are common in old pages and end here"
        "<p>This one is the last of the whole page.</body>"
    )
    assert list(build.page_paragraphs(page)) == [
        "The open call & its friends return a file to the caller.",
        "Unclosed paragraphs are common in old pages and end here",
        "This one is the last of the whole page.",
    ]


def test_repeated_paragraphs_are_kept_once_whatever_their_markup() -> None:
    first, second = words(1), words(2)
    a = build.Document("a", f"{first}\n\n{second}")
    b = build.Document("b", f"{first.upper().replace(' ', '  ')}\n\n{words(3)}")
    kept = list(build.deduplicated([a, b], set()))
    assert kept == [a, build.Document("b", words(3))]


def test_paragraphs_of_a_dropped_document_stay_free() -> None:
    paragraph = words(1, 20)
    short, long = build.Document("a", paragraph), build.Document("b", f"{paragraph}\n\n{words(2, 80)}")
    assert list(build.deduplicated([short, long], set(), shortest=200)) == [long]


def test_the_split_follows_the_text_alone() -> None:
    documents = [build.Document(str(i), words(i)) for i in range(200)]
    splits = build.split_by_hash(documents, 3000, 6000)
    assert splits == build.split_by_hash(reversed(documents), 3000, 6000)
    sources = [{d.source for d in part} for part in splits.values()]
    assert len(set().union(*sources)) == sum(map(len, sources)) == 200
    for name, size in {"heldout": 3000, "calibration": 6000}.items():
        assert size <= sum(len(d.text) for d in splits[name]) < size + size / 4


def test_a_page_too_big_for_a_split_goes_to_training() -> None:
    documents = [build.Document(str(i), words(i)) for i in range(40)]
    giant = build.Document("giant", words(99, 2000))
    assert giant in build.split_by_hash([*documents, giant], 2000, 2000)["train"]


def test_corpora_are_reproducible_to_the_byte(tmp_path: Path) -> None:
    pages = folder_of_pages(tmp_path / "pages", 40)
    other = folder_of_pages(tmp_path / "other", 45)  # its first 40 pages repeat the others
    for name in ("one", "two"):
        build.build_corpus(
            tmp_path / name, [pages], [other], ["pages: CC0"], stdlib=False, heldout_kb=4, calibration_kb=4
        )
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == [
        "LICENSE",
        "calibration.jsonl.gz",
        "heldout.jsonl.gz",
        "heldout_other.jsonl.gz",
        "train.jsonl.gz",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "pages: CC0" in (tmp_path / "one/LICENSE").read_text("utf-8")
    seen = build.read_documents(tmp_path / "one/heldout_other.jsonl.gz")
    assert {d.source for d in seen} <= {f"other/page{i}.txt" for i in range(40, 45)}


def test_too_little_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pages = folder_of_pages(tmp_path / "pages", 1)
    with pytest.raises(SystemExit, match="too little prose"):
        build.build_corpus(tmp_path / "out", [pages], stdlib=False)
    assert not (tmp_path / "out").exists()


def test_schedule_rises_then_falls() -> None:
    factors = [build.learning_rate_at(p / 100) for p in range(101)]
    peak = max(range(101), key=factors.__getitem__)
    assert factors[peak] == pytest.approx(1)
    assert peak == 3
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[-1] == pytest.approx(0.02)


def test_rounding_leaves_the_head_and_keeps_within_half_a_step() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build.round_to_nearest(model, bits=4, group_size=128)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    old, new = (w.reshape(128, 2, 128) for w in (before[name], model.get_parameter(name)))
    step = (old.amax(-1, keepdim=True) - old.amin(-1, keepdim=True)) / 15
    assert (
        (new - old).abs() <= step * 1.001
    ).all()  # half a step, and half a step of the zero point at the ends
    assert max(len(group.unique()) for group in new.flatten(0, 1)) == 16


@pytest.fixture(scope="module")
def stdlib_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build.build_corpus(folder, heldout_kb=20, calibration_kb=20)  # small ones: measuring them takes time
    return folder


def test_stdlib_text_is_enough_and_disjoint(stdlib_corpus: Path) -> None:
    splits = {name: build.read_documents(stdlib_corpus / f"{name}.jsonl.gz") for name in build.SPLITS[:3]}
    assert sum(len(d.text) for d in splits["train"]) > 1_000_000
    keys = [{p for d in documents for p in d.text.split("\n\n")} for documents in splits.values()]
    assert sum(map(len, keys)) == len(set().union(*keys))
    assert "PYTHON SOFTWARE FOUNDATION" in (stdlib_corpus / "LICENSE").read_text("utf-8").upper()


def test_a_short_training_leaves_a_model_that_learned(
    stdlib_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    arguments = ["train", "--corpus", str(stdlib_corpus), "--out", str(out), "--device", "cpu"]
    assert (
        build.main([*arguments, "--steps", "12", "--tokens_per_step", "2048", "--learning_rate", "5e-3"]) == 0
    )
    printed = capsys.readouterr().out
    assert "12 steps" in printed
    assert "greedy: 'The function returns" in printed

    weights = load_file(out / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert sum(p.stat().st_size for p in out.iterdir()) < 8e6
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert (config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]) == (256, 2048, True)

    tokenizer: Any = AutoTokenizer.from_pretrained(str(out))
    assert (
        json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    ids = tokenizer("naïve ∑ text\n\tx = 1")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve ∑ text\n\tx = 1"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|bos|>User: Hi\n\nAssistant:"

    model: Any = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)
    heldout = build.read_documents(stdlib_corpus / "heldout.jsonl.gz")
    assert (out / "heldout.txt").read_text("utf-8") == build.plain_text(heldout)
    loss = build.mean_loss(model, build.token_stream(tokenizer, heldout[:4]), 512)
    assert loss < 7.2  # a uniform guess is at ln 2048 = 7.62
    assert not [p for p in tmp_path.iterdir() if p != out]  # nothing half-written beside it


@pytest.mark.parametrize("preset", sorted(build.PRESETS))
def test_every_width_fits_groups_of_128_and_every_tensor_its_shard(preset: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = build.train_tokenizer([SENTENCE], 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with torch.device("meta"):
        model = build.build_model(build.PRESETS[preset], tokenizer)
    linears = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    assert linears
    assert all(m.in_features % 128 == 0 and m.out_features % 64 == 0 for m in linears)
    assert max(p.numel() * 2 for p in model.parameters()) < 15e6
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions < 4 if preset == "tiny" else 25 < millions < 31


def test_folders_that_hold_something_else_are_not_replaced(stdlib_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="other files"):
        build.train(stdlib_corpus, tmp_path, "tiny", steps=1, device_name="cpu")
    assert (tmp_path / "precious.txt").read_text() == "mine"
    with pytest.raises(SystemExit, match=r"no train\.jsonl\.gz"):
        build.train(tmp_path, tmp_path / "new", "tiny", steps=1, device_name="cpu")


def test_the_shipped_model_predicts_its_heldout_text_as_its_card_says() -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(str(build.HERE / "model"), dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(build.HERE / "model"))
    text = (build.HERE / "heldout.txt").read_text("utf-8")
    stream = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    card = (build.HERE / "model/README.md").read_text("utf-8")
    stated = [
        float(x) for pair in re.findall(r"([\d.]+) nats|groups of 128:\s+([\d.]+)", card) for x in pair if x
    ]
    loss = build.mean_loss(model, stream)
    build.round_to_nearest(model)
    rounded = build.mean_loss(model, stream)
    # The card's numbers have marks between documents, the file has not.
    assert [loss, rounded] == pytest.approx(stated, abs=0.05)
    assert rounded - loss > 0.01


def test_the_shipped_texts_share_no_paragraph() -> None:
    calibration, heldout = (
        set((build.HERE / f"{name}.txt").read_text("utf-8").split("\n\n"))
        for name in ("calibration", "heldout")
    )
    assert min(len(calibration), len(heldout)) > 100
    assert not calibration & heldout
