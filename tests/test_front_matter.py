"""Test the front matter of strangers' model cards: a few keys, soon, whatever stands around them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llm_quantize.evaluation.front_matter import read_front_matter

KEYS = ("license", "license_name", "license_link")


def read(card: bytes) -> dict[str, Any]:
    """Read within a second, on any machine."""
    start = time.process_time()
    found = read_front_matter(card, KEYS)
    assert time.process_time() - start < 2
    return found


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (b"---\nlicense: mit\n---\n# A card", {"license": "mit"}),
        (b"---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        (b"\xef\xbb\xbf---\nlicense: mit\n---", {"license": "mit"}),
        (b"\n\n---\nlicense: mit\n---\n", {"license": "mit"}),
        (b"---\nlicense: [a, b]\nother: 1\n---\n", {"license": ["a", "b"]}),
        (b"---\nlicense: other\nlicense_name: x y\n---\n", {"license": "other", "license_name": "x y"}),
        (b"---\nlicense: caf\xc3\xa9\n---\n", {"license": "caf\u00e9"}),
        (b"---\nlicense: mit\ntags:\n- \xff\n---\n", {"license": "mit"}),
        (b"# A card\n---\nlicense: mit\n---\n", {}),
        (b"---\nlicense: mit\n", {}),
        (b"---\nlicense: [mit\n---\n", {}),
        (b"---\n- a\n---\n", {}),
        (b"---\n\n---\n", {}),
        (b"---\n? [a]\n: b\nlicense: mit\n---\n", {}),
        (b"---\nlicense: !!python/object/apply:os.system ['true']\n---\n", {}),
        (b"---\nlicense: !!binary aaa\n---\n", {}),
        (b"---\nlicense: 2001-99-99\n---\n", {}),
        (b"---\nlicense: a\0b\n---\n", {}),
        (b"", {}),
    ],
)
def test_values(card: bytes, expected: dict[str, Any]) -> None:
    assert read(card) == expected


LONG = b"tags:\n" + b"- tag of a model\n" * 40_000  # 680 KB


def test_of_a_long_one_only_the_keys_are_read() -> None:
    assert read(b"---\nlicense: mit\n" + LONG + b"license_link: LICENSE\n---\n# A card") == {
        "license": "mit",
        "license_link": "LICENSE",
    }
    nested = b"model-index:\n" + b"- name: x\n  license: wrong\n" * 20_000
    assert read(b"---\n" + nested + b'"license":\n- a\n- b\n---\n') == {"license": ["a", "b"]}


@pytest.mark.parametrize(
    "text",
    [
        LONG * 3,  # 2 MB
        b"license: " + b"x" * (1 << 19),
        b"license: " + b"[" * 16_000,
        b"license: " + b"{a: " * 4_000,
        b"license: " + b"? " * 8_000,
        b"license: " + b"- " * 8_000,
        b"license: " + b"1:" * 5_000 + b"1x",
        b"license: " + b"9" * 15_000 + b"x",
        b"---x\n" * 180_000,
        b" \n" * 500_000,
        b'license: "' + b"\\x41" * 3_000,
    ],
)
@pytest.mark.parametrize("closed", [True, False])
def test_absurd_ones_take_no_time(text: bytes, closed: bool) -> None:
    read(b"---\n" + text + (b"\n---\n" if closed else b""))


def test_aliases_are_not_unfolded() -> None:
    lines = ["a: &a [x, x]"] + [
        f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]" for i in range(20)
    ]
    card = "---\nlicense: mit\n" + "\n".join(lines) + "\n---\n"
    assert read(card.encode()) == {}
