"""What one run is asked to do. Every default lives here, or in `CalibrationConfig`; the command line reads them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from llm_quantize.backends import registry
from llm_quantize.calibration.windows import MIN_SEQ_LEN, CalibrationConfig
from llm_quantize.errors import InputError
from llm_quantize.formats import FORMATS, default_format
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT, EMBEDDED_NAME
from llm_quantize.io.shown_names import shown_name
from llm_quantize.options import Option, option
from llm_quantize.types import METHODS, WHOLE_ROW, ActOrderGroups, Method, Quality, QuantScheme

AUTO = "auto"
_UNSET: Any = None  # for fields whose default depends on other fields
BITS: dict[Method, tuple[int, ...]] = {"awq": (4, 8), "gptq": (2, 3, 4, 8)}
SYMMETRIC: dict[Method, bool] = {"awq": False, "gptq": True}  # as the readers of each method's files want it
CALIB_SAMPLES: dict[Method, int] = {"awq": 512, "gptq": 1024}
CALIB_SEQ_LEN: dict[Method, int] = {"awq": 512, "gptq": 2048}
EMBEDDED_SAMPLES = 128
EMBEDDED_SEQ_LEN = 512

FILES, QUANTIZATION, MEASURING, RUNNING = (
    "model and files",
    "quantization",
    "measuring the result",
    "running",
)


def default_calibration(method: Method, *, embedded: bool) -> CalibrationConfig:
    """What calibration takes where nothing is said. embedded: the text beside the embedded model."""
    if embedded:
        return CalibrationConfig(
            data=str(EMBEDDED_CALIBRATION), samples=EMBEDDED_SAMPLES, seq_len=EMBEDDED_SEQ_LEN
        )
    return CalibrationConfig(samples=CALIB_SAMPLES[method], seq_len=CALIB_SEQ_LEN[method])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """One run. Building it checks ranges; `validation.validate` checks combinations and paths.

    model_path: a local directory or a hub id `repo[@revision]`; None: the embedded model.
    output_path: the directory to publish; None: see `target`.
    bits, group_size, symmetric: of the integers; a group size of -1 is the whole row; `symmetric` None: as the readers
        of the method's files want it, asymmetric for AWQ and symmetric for GPTQ.
    desc_act, act_order_groups, damping: for GPTQ; `damping` is a fraction of the Hessian's mean diagonal.
    format: of the files; `auto`: the one that vLLM serves.
    calibration: the text; None: see `default_calibration`.
    eval_data: `auto`, `off`, or as `calibration.data`. max_kl: nats a token. max_ppl_increase: per cent of the source
        model's perplexity. max_memory: GiB of device memory.
    The options' help says the rest. Raises InputError: one line that names the command's option and the remedy.
    """

    method: Method
    calibration: CalibrationConfig = _UNSET
    model_path: str | None = option(
        None,
        Option(
            group=FILES,
            metavar="MODEL",
            default="the embedded model",
            help="model to quantize: a local directory or a hub id, repo[@revision]",
        ),
    )
    output_path: str | None = option(
        None,
        Option(
            group=FILES,
            metavar="DIR",
            default={m: f"./quantized/<model name>-{m}-<bits>bit" for m in METHODS},
            help="directory for the checkpoint; appears complete or not at all",
        ),
    )
    overwrite: bool = option(
        False,
        Option(
            group=FILES,
            kind="boolean",
            help="replace an existing output directory, at the end of a good run",
        ),
    )
    restart: bool = option(
        False,
        Option(
            group=FILES,
            kind="boolean",
            help="begin anew where an interrupted run to the same directory is kept; without it the same command goes "
            "on where that run was",
        ),
    )
    no_resume: bool = option(
        False,
        Option(
            group=FILES,
            kind="boolean",
            help="keep nothing of a run that is interrupted, and begin anew",
        ),
    )
    trust_remote_code: bool = option(
        False,
        Option(
            group=FILES,
            kind="boolean",
            help="run Python code that comes with the model; only for authors you trust",
        ),
    )
    allow_pickle: bool = option(
        False,
        Option(
            group=FILES,
            kind="boolean",
            help="read pickled weights (.bin, .pt) where there are no safetensors; a crafted pickle can run any code "
            "on this machine: only for authors you trust",
        ),
    )
    bits: int = option(
        4,
        Option(
            group=QUANTIZATION,
            kind="integer",
            metavar={method: "|".join(map(str, bits)) for method, bits in BITS.items()},
            help={
                "awq": "bits per weight: 4 for size, 8 for nearly no loss",
                "gptq": "bits per weight: 4 for size, 8 for nearly no loss; 2 and 3 lose much",
            },
        ),
    )
    group_size: int = option(
        128,
        Option(
            group=QUANTIZATION,
            kind="integer",
            metavar="N",
            help="input channels that share a scale: a multiple of 32, or -1 for the whole row; smaller is more "
            "accurate and larger on disk",
        ),
    )
    desc_act: bool = option(
        True,
        Option(
            group=QUANTIZATION,
            methods=("gptq",),
            kind="boolean",
            help="quantize channels by falling activation, more accurate; false for plain channel order",
        ),
    )
    act_order_groups: ActOrderGroups = option(
        "static",
        Option(
            group=QUANTIZATION,
            methods=("gptq",),
            choices=get_args(ActOrderGroups),
            help="static keeps groups where they are, at no cost when served; dynamic lets them follow the order "
            "(g_idx), for ExLlamaV2 and older servers: vLLM refuses it",
        ),
    )
    damping: float = option(
        0.1,
        Option(
            group=QUANTIZATION,
            flag="damp_percent",
            methods=("gptq",),
            kind="number",
            metavar="X",
            help="damping as a fraction (0 to 1) of the Hessian's mean diagonal; raise it for a layer that cannot be "
            "solved",
        ),
    )
    symmetric: bool = option(
        _UNSET,
        Option(
            group=QUANTIZATION,
            flag="zero_point",
            methods=("awq",),
            kind="boolean",
            default="true",
            inverted=True,
            help="asymmetric groups with zero points, more accurate; false for symmetric groups",
        ),
        Option(
            group=QUANTIZATION,
            flag="sym",
            methods=("gptq",),
            kind="boolean",
            default="true",
            help="symmetric groups, which GPTQ kernels read; false is more accurate, and written as "
            "compressed-tensors",
        ),
    )
    format: str = option(
        AUTO,
        Option(
            group=QUANTIZATION,
            choices=(AUTO, *FORMATS),
            help="file format; auto takes the one that vLLM serves for these settings, another one forces it for "
            "another reader (gptq by name: with a tied output head's copy, which AutoGPTQ needs)",
        ),
    )
    quality: Quality = option(
        "default",
        Option(
            group=QUANTIZATION,
            choices=get_args(Quality),
            help="how much search to spend: fast for a trial, best where time does not matter; best also runs the "
            "unquantized model beside the quantized one, and every layer aims at its outputs, and at 2 and 3 bits "
            "tunes whole blocks by gradient; default aims so at 2 and 3 bits, on a share of the text",
        ),
    )
    backend: str = option(
        registry.NATIVE,
        Option(
            group=QUANTIZATION,
            choices={method: registry.choices(method) for method in METHODS},
            help="what does the work: native, this program; else a library of that name, in an environment of its own",
        ),
    )
    eval_data: str = option(
        AUTO,
        Option(
            group=MEASURING,
            metavar="DATA",
            help="held-out text for perplexity and KL divergence: auto takes the text that ships with this program, "
            "off measures nothing, else as --calib_data",
        ),
    )
    eval_samples: int = option(
        16,
        Option(
            group=MEASURING,
            kind="integer",
            metavar="N",
            help="windows to measure on; more for steadier numbers",
        ),
    )
    max_kl: float | None = option(
        None,
        Option(
            group=MEASURING,
            kind="number",
            metavar="X",
            help="fail, and publish nothing, above this KL divergence (nats per token)",
        ),
    )
    max_ppl_increase: float | None = option(
        None,
        Option(
            group=MEASURING,
            kind="number",
            metavar="X",
            help="fail, and publish nothing, where perplexity grows by more than so many per cent",
        ),
    )
    device: str = option(
        AUTO,
        Option(
            group=RUNNING,
            metavar="DEVICE",
            help="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one",
        ),
    )
    max_memory: float | None = option(
        None,
        Option(
            group=RUNNING,
            kind="number",
            metavar="GIB",
            help="device memory to stay under, in GiB, where others use the GPU too",
        ),
    )
    quiet: bool = option(
        False,
        Option(
            group=RUNNING,
            kind="boolean",
            help="print warnings and the output directory alone, for use in scripts",
        ),
    )

    def __post_init__(self) -> None:
        if self.calibration is _UNSET:
            found = default_calibration(self.method, embedded=self.embedded)
            object.__setattr__(self, "calibration", found)
        if self.symmetric is _UNSET:
            object.__setattr__(self, "symmetric", SYMMETRIC[self.method])
        if self.bits not in BITS[self.method]:
            raise InputError(f"--bits {self.bits}: {METHODS[self.method]} takes {_listed(BITS[self.method])}")
        if not 0 <= self.damping <= 1:
            raise InputError(
                f"--damp_percent {self.damping:g}: a fraction from 0 to 1, such as 0.1 for ten per cent"
            )
        self._check_group_size()
        self._check_calibration()
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise InputError(f"--device {self.device}: take auto, cpu, cuda or cuda:N")
        if self.max_memory is not None and not 0 < self.max_memory < math.inf:
            raise InputError(f"--max_memory {self.max_memory:g}: GiB, more than 0; leave it out for no limit")
        if self.eval_samples < 1:
            raise InputError(f"--eval_samples {self.eval_samples}: at least 1; --eval_data off for none")
        for flag, limit in (("max_kl", self.max_kl), ("max_ppl_increase", self.max_ppl_increase)):
            if limit is not None and not 0 <= limit < math.inf:
                raise InputError(f"--{flag} {limit:g}: 0 or more; leave it out for no limit")

    def _check_group_size(self) -> None:
        size = self.group_size
        if size == WHOLE_ROW or (size > 0 and size % 32 == 0):
            return
        if size == 16:
            raise InputError("--group_size 16: vLLM does not serve groups of 16; take 32, 64, 128, 256 or -1")
        raise InputError(
            f"--group_size {size}: a multiple of 32, which packing and vLLM need, or -1 for the whole row"
        )

    def _check_calibration(self) -> None:
        calibration = self.calibration
        if calibration.samples < 1:
            raise InputError(f"--calib_samples {calibration.samples}: at least 1")
        if calibration.seq_len < MIN_SEQ_LEN:
            raise InputError(f"--calib_seq_len {calibration.seq_len}: at least {MIN_SEQ_LEN} tokens")
        if not 0 <= calibration.seed < 2**32:
            raise InputError(f"--seed {calibration.seed}: from 0 to {2**32 - 1}")

    @property
    def embedded(self) -> bool:
        """Whether the embedded model is the one to quantize."""
        return self.model_path is None

    @property
    def native(self) -> bool:
        """Whether this program does the work, and no library."""
        return self.backend == registry.NATIVE

    @property
    def dynamic_groups(self) -> bool:
        """Whether groups follow the activation order (a `g_idx` that is not trivial)."""
        return self.method == "gptq" and self.act_order_groups == "dynamic"

    @property
    def scheme(self) -> QuantScheme:
        """The integers asked for. What depends on the format and the model's dtype is not in it."""
        return QuantScheme(self.bits, self.group_size, self.symmetric, scale_dtypes=())

    @property
    def checkpoint_format(self) -> CheckpointFormat:
        """The format to write, with `auto` resolved."""
        if self.format != AUTO:
            return FORMATS[self.format]
        if not self.native:
            return FORMATS[registry.LIBRARIES[self.backend].format_name(self.method)]
        if self.dynamic_groups:
            return next(each for each in FORMATS.values() if each.has_g_idx)
        return default_format(self.method, self.scheme)

    @property
    def vllm_refusal(self) -> str | None:
        """Why vLLM refuses what is asked for, and what to take instead, in one line; None where vLLM serves it."""
        refusal = self.checkpoint_format.vllm_refusal(self.scheme, self.dynamic_groups)
        if refusal is None and self.method == "gptq" and self.desc_act:
            refusal = registry.vllm_refusal(self.backend, self.group_size)
        return refusal

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

    def identity(self) -> dict[str, str | int | float]:
        """The options that the published bytes depend on, by their names on the command line."""
        found: dict[str, str | int | float] = {
            "the method": self.method,
            "--bits": self.bits,
            "--group_size": self.group_size,
            **(
                {"--zero_point": str(not self.symmetric)}
                if self.method == "awq"
                else {"--sym": str(self.symmetric)}
            ),
            "--format": self.checkpoint_format.name,
            "--quality": self.quality,
        }
        if self.method == "gptq":
            found["--desc_act"] = str(self.desc_act)
            found["--act_order_groups"] = self.act_order_groups
            found["--damp_percent"] = self.damping
        return found

    def command(self) -> list[str]:
        """The words of the command that makes this checkpoint again: every option that the result depends on.

        A local path is given by its last part.
        """
        calibration = self.calibration
        own_text = self.embedded and calibration.data == str(EMBEDDED_CALIBRATION)
        options: dict[str, object] = {
            "model_path": None if self.model_path is None else shown_name(self.model_path),
            "bits": self.bits,
            "group_size": self.group_size,
        }
        if self.method == "awq":
            options["zero_point"] = not self.symmetric
        else:
            options |= {
                "desc_act": self.desc_act,
                "act_order_groups": self.act_order_groups,
                "damp_percent": self.damping,
                "sym": self.symmetric,
            }
        options["format"] = self.format  # as given: asking for a format by name may also repeat a tied head
        options |= {"quality": self.quality} if self.native else {"backend": self.backend}
        options |= {
            "calib_data": None if own_text else shown_text(calibration.data),
            "calib_samples": calibration.samples,
            "calib_seq_len": calibration.seq_len,
            "calib_column": calibration.column,
            "seed": calibration.seed,
            "eval_data": shown_text(self.eval_data),
            "eval_samples": self.eval_samples if self.eval_data != "off" else None,
            "trust_remote_code": self.trust_remote_code or None,
            "allow_pickle": self.allow_pickle or None,
        }
        words = ["python", f"inference/quantize/{self.method}_quantize.py"]
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
        return words


def shown_text(data: str) -> str:
    """A data set as others may see it; the texts that ship with the program by their path in it."""
    for own in (EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT):
        if data == str(own):
            return f"inference/quantize/embedded/{own.name}"
    return shown_name(data)


def _listed(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"
