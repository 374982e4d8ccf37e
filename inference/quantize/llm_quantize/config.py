"""What one run is asked to do. Every default lives here, once; `cli.py` reads them for argparse and help."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm_quantize.backends import registry
from llm_quantize.errors import InputError
from llm_quantize.formats import layouts

Method = Literal["awq", "gptq"]
Layout = Literal["awq", "gptq", "compressed-tensors"]
LayoutChoice = Literal["auto", "awq", "gptq", "compressed-tensors"]
ActOrderGroups = Literal["static", "dynamic"]
Quality = Literal["fast", "default", "best"]
Backend = Literal["native", "autoawq", "auto-gptq", "optimum", "gptqmodel"]

VERSION = "0.1.0"  # pyproject.toml's
BITS: dict[str, tuple[int, ...]] = {"awq": (4, 8), "gptq": (2, 3, 4, 8)}
CALIB_SAMPLES = {"awq": 512, "gptq": 1024}
CALIB_SEQ_LEN = {"awq": 512, "gptq": 2048}
MIN_SEQ_LEN = 32

# The model that ships beside this module, and text for it that its training never saw.
EMBEDDED_NAME = "tiny"
EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "embedded" / "model"
EMBEDDED_CALIBRATION = EMBEDDED_MODEL.parent / "calibration.txt"
EMBEDDED_HELDOUT = EMBEDDED_MODEL.parent / "heldout.txt"
EMBEDDED_SAMPLES = 128
EMBEDDED_SEQ_LEN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Where calibration text comes from, and how much of it is taken.

    `data` is a name (`wikitext`, `c4`, `pileval`), a hub id `repo[:config[:split[:column]]]`, a local file
    (.txt .jsonl .json .csv .parquet, also .gz) or a directory from `datasets.save_to_disk`.
    """

    data: str = "wikitext"
    samples: int = 512
    seq_len: int = 512
    column: str | None = None
    seed: int = 0


def default_calibration(method: Method, *, embedded: bool) -> CalibrationConfig:
    """What calibration takes where nothing is said: `embedded`, the text beside the embedded model."""
    if embedded:
        return CalibrationConfig(
            data=str(EMBEDDED_CALIBRATION), samples=EMBEDDED_SAMPLES, seq_len=EMBEDDED_SEQ_LEN
        )
    return CalibrationConfig(samples=CALIB_SAMPLES[method], seq_len=CALIB_SEQ_LEN[method])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """One run. Building it checks ranges and combinations; whether paths and devices exist is not asked here.

    `model_path` None: the embedded model. `output_path` None: see `target`. `group_size` -1: the whole row.
    `zero_point` counts for AWQ; `desc_act`, `act_order_groups`, `damp_percent` (a fraction of the second
    moment's mean diagonal) and `sym` for GPTQ. `max_memory`: GiB of device memory. `max_kl`: nats per token;
    `max_ppl_increase`: per cent of the source model's perplexity.

    Raises InputError: one line that names the command's argument and the remedy.
    """

    method: Method
    calibration: CalibrationConfig
    model_path: str | None = None
    output_path: str | None = None
    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    desc_act: bool = True
    act_order_groups: ActOrderGroups = "static"
    damp_percent: float = 0.1
    sym: bool = True
    layout: LayoutChoice = "auto"
    quality: Quality = "default"
    backend: Backend = "native"
    device: str = "auto"
    max_memory: float | None = None
    overwrite: bool = False
    restart: bool = False
    no_resume: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    eval_data: str = "auto"
    eval_samples: int = 16
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        name = {"awq": "AWQ", "gptq": "GPTQ"}[self.method]
        if self.bits not in BITS[self.method]:
            raise InputError(f"--bits {self.bits}: {name} takes {_listed(BITS[self.method])}")
        _check_group_size(self.group_size)
        if not 0 <= self.damp_percent <= 1:
            raise InputError(
                f"--damp_percent {self.damp_percent:g}: a fraction from 0 to 1, such as 0.1 for ten per cent"
            )
        calibration = self.calibration
        if calibration.samples < 1:
            raise InputError(f"--calib_samples {calibration.samples}: at least 1")
        if calibration.seq_len < MIN_SEQ_LEN:
            raise InputError(f"--calib_seq_len {calibration.seq_len}: at least {MIN_SEQ_LEN} tokens")
        if not 0 <= calibration.seed < 2**32:
            raise InputError(f"--seed {calibration.seed}: from 0 to {2**32 - 1}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise InputError(f"--device {self.device}: take auto, cpu, cuda or cuda:N")
        if self.max_memory is not None and not 0 < self.max_memory < math.inf:
            raise InputError(f"--max_memory {self.max_memory:g}: GiB, more than 0; leave it out for no limit")
        if self.eval_samples < 1:
            raise InputError(f"--eval_samples {self.eval_samples}: at least 1; --eval_data off for none")
        for flag, limit in (("max_kl", self.max_kl), ("max_ppl_increase", self.max_ppl_increase)):
            if limit is None:
                continue
            if not 0 <= limit < math.inf:
                raise InputError(f"--{flag} {limit:g}: 0 or more; leave it out for no limit")
            if self.eval_data == "off":
                raise InputError(f"--{flag} needs a measurement: leave --eval_data off out")
        if self.dynamic_groups and not self.desc_act:
            raise InputError(
                "--act_order_groups dynamic needs --desc_act true: take static, or leave it true"
            )
        registry.check(self)
        layouts.check_layout(
            self.file_layout, self.method, self.bits, self.group_size, self.symmetric, self.dynamic_groups
        )
        self._check_paths()

    def _check_paths(self) -> None:
        for flag, text in (("model_path", self.model_path), ("output_path", self.output_path)):
            if text is not None and (not text.strip() or "\0" in text):
                raise InputError(f"--{flag} is empty: give a directory, or leave it out")
        if self.eval_data.strip() == "":
            raise InputError("--eval_data is empty: give auto, off, or what --calib_data takes")
        if self.calibration.data.strip() == "":
            raise InputError("--calib_data is empty: give wikitext, c4, pileval, a hub id or a local file")
        try:
            model = Path(self.model_path).expanduser() if self.model_path is not None else EMBEDDED_MODEL
            self.target.is_dir()  # raises where its name cannot be one
            if not model.is_dir():
                return
            model, target = model.resolve(), self.target.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user without a home
            raise InputError(f"--model_path or --output_path cannot be looked for: {error}") from None
        # Publishing replaces the target as a whole: never the source, nor a directory that holds it.
        if target == model or target in model.parents or model in target.parents:
            raise InputError(f"--output_path {target} and the model {model} overlap: take another directory")

    @property
    def symmetric(self) -> bool:
        """Whether the grid is symmetric: zero points all at the middle."""
        return not self.zero_point if self.method == "awq" else self.sym

    @property
    def dynamic_groups(self) -> bool:
        """Whether groups follow the activation order (a `g_idx` that is not trivial)."""
        return self.method == "gptq" and self.act_order_groups == "dynamic"

    @property
    def file_layout(self) -> Layout:
        """The layout to write, with `auto` resolved."""
        if self.layout != "auto":
            return self.layout
        if self.backend != registry.NATIVE:
            return registry.LIBRARIES[self.backend].writes(self.method)
        # Only this layout has g_idx.
        return (
            "gptq" if self.dynamic_groups else layouts.choose_layout(self.method, self.bits, self.symmetric)
        )

    @property
    def not_served(self) -> str | None:
        """Why vLLM refuses what is asked for, and what to take instead; None where it serves it. One line."""
        return layouts.not_served(
            self.file_layout, self.bits, self.group_size, self.symmetric, self.dynamic_groups
        ) or registry.not_served(self)

    @property
    def embedded(self) -> bool:
        """Whether the embedded model is the one to quantize."""
        return self.model_path is None

    @property
    def target(self) -> Path:
        """The directory to publish: `output_path`, else ./quantized/<model name>-<method>-<bits>bit."""
        if self.output_path is not None:
            return Path(self.output_path).expanduser()
        if self.model_path is None:
            name = EMBEDDED_NAME
        elif (path := Path(self.model_path).expanduser()).is_dir():
            name = path.resolve().name or "model"
        else:
            name = self.model_path.partition("@")[0].rstrip("/").rpartition("/")[2] or "model"
        return Path("quantized") / f"{name}-{self.method}-{self.bits}bit"

    @property
    def may_replace(self) -> bool:
        """Whether an existing target may be replaced: asked for, or the embedded run's own default target."""
        return self.overwrite or (self.model_path is None and self.output_path is None)


def _check_group_size(group_size: int) -> None:
    if group_size == -1 or (group_size > 0 and group_size % 32 == 0):
        return
    if group_size == 16:
        raise InputError("--group_size 16: vLLM does not serve groups of 16; take 32, 64, 128, 256 or -1")
    raise InputError(
        f"--group_size {group_size}: a multiple of 32, which packing and vLLM need, or -1 for the whole row"
    )


def _listed(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
