"""The checkpoint formats, by name. The order counts: the first that calls itself the default is."""

from __future__ import annotations

from llm_quantize.formats.awq import AWQFormat
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.formats.compressed_tensors import CompressedTensorsFormat
from llm_quantize.formats.gptq import GPTQFormat
from llm_quantize.types import Method, QuantScheme

FORMATS: dict[str, CheckpointFormat] = {
    each.name: each for each in (AWQFormat(), GPTQFormat(), CompressedTensorsFormat())
}


def default_format(method: Method, scheme: QuantScheme) -> CheckpointFormat:
    """The format in which vLLM serves such weights: the method's own, else compressed-tensors."""
    return next(each for each in FORMATS.values() if each.is_default(method, scheme))
