"""Test the formats: words written by hand, the independent packers of `reference.py`, and round trips."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from llm_quantize.errors import InputError
from llm_quantize.formats import FORMATS
from llm_quantize.formats.base import ModuleNames, Unpacked
from llm_quantize.solver.qparams import QParams
from llm_quantize.types import QuantScheme
from reference import (
    Layer,
    groups_in_order,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    shuffled_groups,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
)
from reference import quantization_config as reference_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [
    (name, bits, symmetric)
    for name, form in FORMATS.items()
    for bits in form.bits
    for symmetric in (True, False)
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return str(request.param)


def random_layer(bits: int, symmetric: bool, out: int, width: int, group_size: int, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    groups = 1 if group_size == -1 else width // group_size
    zeros = rng.integers(0, 2**bits, (out, groups))
    # Scales of both signs that float16 and bfloat16 hold exactly.
    scales = rng.integers(1, 128, (out, groups)) * rng.choice([-1.0, 1.0], (out, groups)) / 4096
    return Layer(
        q=rng.integers(0, 2**bits, (out, width)),
        zeros=np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=scales.astype(np.float32),
        group=groups_in_order(width, group_size),
    )


def pack_layer(
    name: str,
    layer: Layer,
    scheme: QuantScheme,
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float16,
    g_idx: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Pack a layer by the product: its tensors by suffix. dtype: of the model's weights."""
    qparams = QParams(
        torch.from_numpy(layer.scales).to(device), torch.from_numpy(layer.zeros.astype(np.float32)).to(device)
    )
    q = torch.from_numpy(layer.q.astype(np.uint8)).to(device)
    return FORMATS[name].pack(q, qparams, scheme, dtype, g_idx)


def config_of(name: str, scheme: QuantScheme, *, dynamic_groups: bool = False) -> dict[str, Any]:
    """Return the `quantization_config` that the product writes."""
    return FORMATS[name].quantization_config(
        scheme, dynamic_groups=dynamic_groups, damping=0.1, modules=ModuleNames(("lm_head",))
    )


def unpack_layer(name: str, tensors: dict[str, torch.Tensor], scheme: QuantScheme) -> Unpacked:
    """Unpack a layer by the product, with the settings in its own `quantization_config`."""
    form = FORMATS[name]
    return form.unpack(tensors, form.stored_settings(config_of(name, scheme)))


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("name", "bits", "symmetric"), CASES)
def test_words_equal_the_independent_packer(
    name: str, bits: int, symmetric: bool, group_size: int, device: str
) -> None:
    layer = random_layer(bits, symmetric, 64, 96, group_size)
    scheme = QuantScheme(bits, group_size, symmetric)
    found = pack_layer(name, layer, scheme, device)
    expected = {
        "awq": lambda: pack_awq(layer),
        "gptq": lambda: pack_gptq(layer, bits),
        "compressed-tensors": lambda: pack_compressed_tensors(layer, bits, symmetric),
    }[name]()
    assert set(found) == set(expected)
    for suffix, tensor in found.items():
        assert tensor.is_contiguous()
        if suffix == "weight_scale":
            assert tensor.dtype == torch.float16
            np.testing.assert_array_equal(tensor.float().cpu().numpy(), expected[suffix])
        else:
            assert tensor.cpu().numpy().dtype == expected[suffix].dtype, suffix
            np.testing.assert_array_equal(tensor.cpu().numpy(), expected[suffix], err_msg=suffix)

    planned = FORMATS[name].plan(64, 96, scheme, torch.float16)
    assert planned == {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in found.items()}
    assert set(found) <= set(FORMATS[name].parts)
    read = unpack_layer(name, found, scheme)
    assert (read.q.dtype, read.scale.dtype, read.zero.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert read.group is None
    np.testing.assert_array_equal(read.q.cpu().numpy(), layer.q)
    np.testing.assert_array_equal(read.scale.cpu().numpy(), layer.scales)
    np.testing.assert_array_equal(read.zero.cpu().numpy(), layer.zeros)


@pytest.mark.parametrize(("name", "bits", "symmetric"), CASES)
def test_independent_unpacker_reads_the_words(name: str, bits: int, symmetric: bool) -> None:
    layer = random_layer(bits, symmetric, 32, 128, 64, seed=1)
    packed = pack_layer(name, layer, QuantScheme(bits, 64, symmetric))
    tensors = {suffix: tensor.numpy() for suffix, tensor in packed.items()}
    found = {
        "awq": lambda: unpack_awq(tensors, 64),
        "gptq": lambda: unpack_gptq(tensors, bits),
        "compressed-tensors": lambda: unpack_compressed_tensors(tensors, bits, 64),
    }[name]()
    np.testing.assert_array_equal(found.dequantized(), layer.dequantized())


def one_row_in(values: list[int], zero: int = 8) -> tuple[torch.Tensor, QParams]:
    """Make 8 equal rows of `values`, (8, n), in one group."""
    q = torch.tensor([values] * 8, dtype=torch.uint8)
    return q, QParams(torch.full((8, 1), 0.5), torch.full((8, 1), float(zero)))


def test_awq_words_by_hand() -> None:
    # One input channel whose eight output channels hold 0 ... 7: low nibble first 0, 2, 4, 6, 1, 3, 5, 7.
    q = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    qparams = QParams(torch.full((8, 1), 0.5), torch.arange(8.0).reshape(8, 1))
    found = FORMATS["awq"].pack(q, qparams, QuantScheme(4, -1, False), torch.float16)
    assert found["qweight"].tolist() == [[0x75316420]]
    assert found["qzeros"].tolist() == [[0x75316420]]
    assert found["scales"].tolist() == [[0.5] * 8]


def test_gptq_words_by_hand() -> None:
    q, qparams = one_row_in([1, 2, 3, 4, 5, 6, 7, 8])
    found = FORMATS["gptq"].pack(q, qparams, QuantScheme(4, -1, True), torch.float16)
    assert found["qweight"].tolist() == [[0x87654321 - 2**32] * 8]
    assert found["qzeros"].tolist() == [[0x77777777]]  # 8 less one
    assert found["g_idx"].tolist() == [0] * 8


def test_gptq_zero_point_zero_wraps() -> None:
    q, qparams = one_row_in([0] * 8, zero=0)
    found = FORMATS["gptq"].pack(q, qparams, QuantScheme(4, -1, False), torch.float16)
    assert found["qzeros"].tolist() == [[-1]]


def test_gptq_three_bits_cross_words_by_hand() -> None:
    # All ones in values 10 (bits 30, 31 and 32) and 21 (bits 63, 64, 65); the other 30 are zero.
    q = torch.zeros(32, 32, dtype=torch.uint8)
    q[:, [10, 21]] = 7
    qparams = QParams(torch.ones(32, 1), torch.ones(32, 1))
    found = FORMATS["gptq"].pack(q, qparams, QuantScheme(3, -1, False), torch.float16)
    assert found["qweight"][:, 0].tolist() == [0xC0000000 - 2**32, 0x80000001 - 2**32, 0x00000003]
    assert found["qzeros"].tolist() == [[0, 0, 0]]


def test_compressed_tensors_words_by_hand() -> None:
    q, qparams = one_row_in([1, 2, 3, 4, 5, 6, 7, 8], zero=9)
    found = FORMATS["compressed-tensors"].pack(q, qparams, QuantScheme(4, -1, False), torch.bfloat16)
    assert found["weight_packed"].tolist() == [[0x87654321 - 2**32]] * 8
    assert found["weight_zero_point"].tolist() == [[0x99999999 - 2**32]]
    assert found["weight_shape"].tolist() == [8, 8]
    assert found["weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_library_reads_it(bits: int, symmetric: bool) -> None:
    layer = random_layer(bits, symmetric, 24, 96, 32)  # widths that fill no whole word at some bits
    scheme = QuantScheme(bits, 32, symmetric)
    tensors = pack_layer("compressed-tensors", layer, scheme, dtype=torch.float32)
    config = config_of("compressed-tensors", scheme)
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    found = PackedQuantizationCompressor.decompress(tensors, group)["weight"]
    np.testing.assert_array_equal(found.numpy(), layer.dequantized())


def test_compressed_tensors_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, scheme = random_layer(3, False, 40, 96, 32), QuantScheme(3, 32, False)
    whole = pack_layer("compressed-tensors", layer, scheme)
    monkeypatch.setattr("llm_quantize.formats.compressed_tensors.PACKED_TOGETHER", 96 * 7)
    monkeypatch.setattr("llm_quantize.formats.bit_streams.UNPACKED_TOGETHER", 96 * 7)
    sliced = pack_layer("compressed-tensors", layer, scheme)
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)
    np.testing.assert_array_equal(unpack_layer("compressed-tensors", whole, scheme).q.numpy(), layer.q)


def test_g_idx_is_kept() -> None:
    layer, scheme = random_layer(4, True, 32, 64, 16), QuantScheme(4, 16, True)
    group = torch.from_numpy(shuffled_groups(64, 16, 5)).to(torch.int32)
    found = pack_layer("gptq", layer, scheme, g_idx=group)
    assert torch.equal(found["g_idx"], group)
    form = FORMATS["gptq"]
    read = form.unpack(found, form.stored_settings(config_of("gptq", scheme, dynamic_groups=True)))
    assert read.group is not None
    assert torch.equal(read.group, group.long())
    trivial = pack_layer("gptq", layer, scheme)["g_idx"]
    assert trivial.tolist() == [i // 16 for i in range(64)]
    with pytest.raises(ValueError, match="no g_idx"):
        pack_layer("awq", layer, scheme, g_idx=group)


def test_zero_points_of_symmetric_groups_must_be_the_middle() -> None:
    with pytest.raises(ValueError, match="zero points of symmetric groups are 8"):
        pack_layer("compressed-tensors", random_layer(4, False, 8, 32, 32), QuantScheme(4, 32, True))


def test_scales_for_other_groups_are_refused() -> None:
    q, qparams = one_row_in([0] * 8)
    with pytest.raises(ValueError, match="8 rows of 2 groups"):
        FORMATS["awq"].pack(q, qparams, QuantScheme(4, 4, True), torch.float16)


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "out", "width", "message"),
    [
        ("gptq", 4, 128, 64, 96, "X has 96 input channels, which 128 does not divide"),
        ("awq", 4, 32, 36, 64, "X has 36 output channels, not a multiple of 8"),
        ("gptq", 3, 16, 64, 48, "X has 48 input channels, not a multiple of 32"),
        ("gptq", 8, -1, 66, 64, "X has 66 output channels, not a multiple of 4"),
    ],
)
def test_widths_that_do_not_fit(
    name: str, bits: int, group_size: int, out: int, width: int, message: str
) -> None:
    found = FORMATS[name].misfit(QuantScheme(bits, group_size, True), "X", out, width)
    assert found is not None
    assert message in found
    assert FORMATS["compressed-tensors"].misfit(QuantScheme(bits, -1, True), "X", out, width) is None


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("name", "bits", "symmetric"), CASES)
def test_quantization_config(name: str, bits: int, symmetric: bool, group_size: int) -> None:
    found = config_of(name, QuantScheme(bits, group_size, symmetric))
    assert json.loads(json.dumps(found)) == found
    assert FORMATS[name].stored_settings(found).bits == bits
    expected = reference_config(name, bits, group_size, symmetric, act_order=False)
    if name != "compressed-tensors":
        assert found == expected
        return
    assert found.items() >= {k: v for k, v in expected.items() if k != "config_groups"}.items()
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"].items() >= expected["config_groups"]["group_0"]["weights"].items()


def test_desc_act_is_gptqs() -> None:
    scheme = QuantScheme(4, 128, True)
    assert config_of("gptq", scheme, dynamic_groups=True)["desc_act"] is True
    FORMATS["gptq"].check_scheme(scheme, dynamic_groups=True, otherwise="")
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(InputError, match=f"{name} has no g_idx"):
            FORMATS[name].check_scheme(scheme, dynamic_groups=True, otherwise="")
