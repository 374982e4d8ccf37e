"""Split documents into pieces and draw a random sample of them. This module knows nothing of tokens."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llm_quantize.calibration.conversations import Conversation


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of the sample: a piece of a document, or a whole conversation that is not rendered yet.

    document: the number of its document in the source. size: characters.
    """

    document: int
    size: int
    content: str | Conversation


def draw(items: Iterable[Item], budget: int, seed: int, most: int) -> list[Item]:
    """Shuffle items by `seed` and return the first ones, of `budget` characters together or slightly more.

    most: items at most, since short ones take more memory than their characters.

    Every item gets a random key, and the items with the smallest keys are kept. So one pass samples the whole source
    evenly and holds no more than the budget in memory. A larger budget gives the same items first, then more.
    """
    rng = random.Random(seed)
    heap: list[tuple[float, int, Item]] = []
    held = 0
    for index, item in enumerate(items):
        key = rng.random()
        if (held >= budget or len(heap) >= most) and -heap[0][0] < key:
            continue
        heapq.heappush(heap, (-key, index, item))
        held += item.size
        while held - heap[0][2].size >= budget or len(heap) > most:
            held -= heapq.heappop(heap)[2].size
    return [item for _, _, item in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]


def take_first(items: Iterable[Item], budget: int, most: int) -> Iterator[Item]:
    """Yield items in their order until they have `budget` characters together, or are `most`."""
    for item in itertools.islice(items, most):
        yield item
        budget -= item.size
        if budget <= 0:
            return


def batches(items: Iterable[Item], size: int, most: int) -> Iterator[list[Item]]:
    """Group items, in their order, into lists of `size` characters or slightly more, but of at most `most` items.

    The last list may have fewer.
    """
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += item.size
        if held >= size or len(batch) == most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def split_text(text: str, limit: int) -> Iterator[str]:
    """Yield consecutive pieces of at most `limit` characters.

    A piece ends after a line end in its second half, else after a space there, else at the limit.
    """
    start = 0
    while len(text) - start > limit:
        middle, end = start + limit // 2, start + limit
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]
