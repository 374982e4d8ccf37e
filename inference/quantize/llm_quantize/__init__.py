"""Quantizes Hugging Face causal language models to 2, 3, 4 and 8 bits by GPTQ and AWQ.

    from llm_quantize import QuantizeConfig, quantize

    result = quantize(QuantizeConfig(method="gptq", model_path="Qwen/Qwen2.5-7B-Instruct"))
    print(result.output, result.measured)

Names are imported when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

from llm_quantize.version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from llm_quantize.calibration.windows import CalibrationConfig as CalibrationConfig
    from llm_quantize.config import QuantizeConfig as QuantizeConfig
    from llm_quantize.errors import InputError as InputError
    from llm_quantize.errors import WorkError as WorkError
    from llm_quantize.pipeline import Result as Result
    from llm_quantize.pipeline import quantize as quantize

__all__ = ["CalibrationConfig", "InputError", "QuantizeConfig", "Result", "WorkError", "quantize"]

_HOMES = {
    "CalibrationConfig": "calibration.windows",
    "InputError": "errors",
    "QuantizeConfig": "config",
    "Result": "pipeline",
    "WorkError": "errors",
    "quantize": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
