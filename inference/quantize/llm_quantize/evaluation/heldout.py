"""Held-out text: token windows that calibration does not use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from llm_quantize.calibration.text_use import HELD_OUT
from llm_quantize.calibration.windows import CalibrationConfig, load_windows
from llm_quantize.io.embedded_files import EMBEDDED_HELDOUT

EVAL_SEQ_LEN = 512


def heldout_windows(
    data: str,
    samples: int,
    calibration: CalibrationConfig,
    tokenizer: Any,
    *,
    embedded: bool,
    log: Callable[[str], None],
) -> Tensor:
    """Token windows, int64 (n, length), of held-out text.

    data: `auto` for the text that ships beside the embedded model, for other models too; else as `calibration.data`.
    embedded: whether the embedded model is the one to measure. Raises InputError, as `calibration.windows`.
    """
    if data == "auto":
        data = str(EMBEDDED_HELDOUT)
        if not embedded:
            log("measured on the short neutral text that ships with this program: --eval_data takes yours")
    elif data == calibration.data:
        log(f"{data} is the calibration data too: what is measured may be better than on text never seen")
    asked = replace(
        calibration,
        data=data,
        samples=samples,
        seq_len=min(calibration.seq_len, EVAL_SEQ_LEN),
        column=calibration.column if data == calibration.data else None,
        seed=(calibration.seed + 1) % 2**32,
    )
    return load_windows(asked, tokenizer, log=log, use=HELD_OUT).tokens
