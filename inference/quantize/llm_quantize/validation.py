"""Everything that can be refused before a model is opened: combinations of options, and places."""

from __future__ import annotations

from pathlib import Path

from llm_quantize.backends import registry
from llm_quantize.calibration.text_use import HELD_OUT
from llm_quantize.calibration.windows import check_data, check_source
from llm_quantize.config import AUTO, QuantizeConfig
from llm_quantize.errors import InputError
from llm_quantize.formats import default_format
from llm_quantize.io.atomic_directory import check_before_work
from llm_quantize.io.embedded_files import EMBEDDED_MODEL
from llm_quantize.io.hub import local_model


def validate(config: QuantizeConfig) -> None:
    """Check combinations of options, and the names of places. Raises InputError naming option and remedy."""
    for flag, limit in (("max_kl", config.max_kl), ("max_ppl_increase", config.max_ppl_increase)):
        if limit is not None and config.eval_data == "off":
            raise InputError(f"--{flag} needs a measurement: leave --eval_data off out")
    if config.dynamic_groups and not config.desc_act:
        raise InputError("--act_order_groups dynamic needs --desc_act true: take static, or leave it true")
    registry.check_request(
        config.backend,
        config.method,
        config.scheme,
        format_name=None if config.format == AUTO else config.format,
        quality=config.quality,
        limited_memory=config.max_memory is not None,
        damping=config.damping,
    )
    instead = default_format(config.method, config.scheme).name
    config.checkpoint_format.check_scheme(
        config.scheme,
        config.dynamic_groups,
        otherwise=f"{config.method} at {config.bits} bits is written as {instead}",
    )
    _check_places(config)


def _check_places(config: QuantizeConfig) -> None:
    for flag, text in (("model_path", config.model_path), ("output_path", config.output_path)):
        if text is not None and (not text.strip() or "\0" in text):
            raise InputError(f"--{flag} is empty: give a directory, or leave it out")
    if config.eval_data.strip() == "":
        raise InputError("--eval_data is empty: give auto, off, or what --calib_data takes")
    if config.calibration.data.strip() == "":
        raise InputError("--calib_data is empty: give wikitext, c4, pileval, a hub id or a local file")
    try:
        model = Path(config.model_path).expanduser() if config.model_path is not None else EMBEDDED_MODEL
        config.target.is_dir()  # raises where its name cannot be one
        if not model.is_dir():
            return
        model, target = model.resolve(), config.target.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a user without a home
        raise InputError(f"--model_path or --output_path cannot be looked for: {error}") from None
    # Publishing replaces the target as a whole: never the source, nor a directory that holds it.
    if target == model or target in model.parents or model in target.parents:
        raise InputError(f"--output_path {target} and the model {model} overlap: take another directory")


def check_places(config: QuantizeConfig) -> None:
    """Look at the text, the model and the target where they are local. Raises InputError."""
    check_source(config.calibration)
    if config.eval_data not in ("auto", "off"):
        check_data(config.eval_data, HELD_OUT)
    if config.model_path is not None:
        local_model(config.model_path)
    check_before_work(config.target, config.may_replace)
