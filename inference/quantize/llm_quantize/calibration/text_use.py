"""Name what text is read for, so that messages use the words and the flags of the command that reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextUse:
    """What text is read for, as messages name it.

    noun: the first words of a warning, such as `calibration: ...`.
    what: the text itself, in the middle of a sentence.
    too_little: the first words of the error where the text is shorter than one window.
    flags: the first characters of the command's flags for the text, such as `--calib_` of `--calib_column`.
    data: the flag that names the text.
    """

    noun: str
    what: str
    too_little: str
    flags: str
    data: str


CALIBRATION = TextUse(
    "calibration", "calibration data", "too little text to calibrate on", "--calib_", "--calib_data"
)
# A quantizing command reads held-out text by the flags of its calibration; evaluate.py has flags of its own.
HELD_OUT = TextUse("held-out text", "held-out text", "too little held-out text", "--calib_", "--eval_data")
EVALUATION = TextUse("held-out text", "held-out text", "too little held-out text", "--", "--data")
