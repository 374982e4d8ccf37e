"""Words written by hand, the independent packers of `reference.py`, and round trips."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from llm_quantize.errors import InputError
from llm_quantize.formats.layouts import HOLDS
from llm_quantize.formats.packing import check_shape, pack, planned, quantization_config, unpack
from llm_quantize.solver.qparams import QParams
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
    (layout, bits, symmetric)
    for layout, held in HOLDS.items()
    for bits in held
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


def product_pack(
    layout: str, layer: Layer, bits: int, symmetric: bool, group_size: int, device: str = "cpu", **more: Any
) -> dict[str, torch.Tensor]:
    grid = QParams(
        torch.from_numpy(layer.scales).to(device), torch.from_numpy(layer.zeros.astype(np.float32)).to(device)
    )
    q = torch.from_numpy(layer.q.astype(np.uint8)).to(device)
    return pack(layout, q, grid, group_size, bits, symmetric=symmetric, **more)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("layout", "bits", "symmetric"), CASES)
def test_words_equal_the_independent_packer(
    layout: str, bits: int, symmetric: bool, group_size: int, device: str
) -> None:
    layer = random_layer(bits, symmetric, 64, 96, group_size)
    found = product_pack(layout, layer, bits, symmetric, group_size, device)
    expected = {
        "awq": lambda: pack_awq(layer),
        "gptq": lambda: pack_gptq(layer, bits),
        "compressed-tensors": lambda: pack_compressed_tensors(layer, bits, symmetric),
    }[layout]()
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.is_contiguous()
        if name == "weight_scale":
            assert tensor.dtype == torch.float16
            np.testing.assert_array_equal(tensor.float().cpu().numpy(), expected[name])
        else:
            assert tensor.cpu().numpy().dtype == expected[name].dtype, name
            np.testing.assert_array_equal(tensor.cpu().numpy(), expected[name], err_msg=name)

    prefetch = planned(layout, 64, 96, group_size, bits, symmetric=symmetric)
    assert prefetch == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    q, scale, zero = unpack(layout, found, bits, group_size)
    assert (q.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.float32, torch.float32)
    np.testing.assert_array_equal(q.cpu().numpy(), layer.q)
    np.testing.assert_array_equal(scale.cpu().numpy(), layer.scales)
    np.testing.assert_array_equal(zero.cpu().numpy(), layer.zeros)


@pytest.mark.parametrize(("layout", "bits", "symmetric"), CASES)
def test_independent_unpacker_reads_the_words(layout: str, bits: int, symmetric: bool) -> None:
    layer = random_layer(bits, symmetric, 32, 128, 64, seed=1)
    tensors = {name: t.numpy() for name, t in product_pack(layout, layer, bits, symmetric, 64).items()}
    found = {
        "awq": lambda: unpack_awq(tensors, 64),
        "gptq": lambda: unpack_gptq(tensors, bits),
        "compressed-tensors": lambda: unpack_compressed_tensors(tensors, bits, 64),
    }[layout]()
    np.testing.assert_array_equal(found.dequantized(), layer.dequantized())


def one_row_in(values: list[int], zero: int = 8) -> tuple[torch.Tensor, QParams]:
    """`values` as 8 equal rows' only input channels: (8, n), one group."""
    q = torch.tensor([values] * 8, dtype=torch.uint8)
    return q, QParams(torch.full((8, 1), 0.5), torch.full((8, 1), float(zero)))


def test_awq_words_by_hand() -> None:
    # One input channel whose eight output channels hold 0 ... 7: low nibble first 0, 2, 4, 6, 1, 3, 5, 7.
    q = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    grid = QParams(torch.full((8, 1), 0.5), torch.arange(8.0).reshape(8, 1))
    found = pack("awq", q, grid, -1, 4, symmetric=False)
    assert found["qweight"].tolist() == [[0x75316420]]
    assert found["qzeros"].tolist() == [[0x75316420]]
    assert found["scales"].tolist() == [[0.5] * 8]


def test_gptq_words_by_hand() -> None:
    q, grid = one_row_in([1, 2, 3, 4, 5, 6, 7, 8])
    found = pack("gptq", q, grid, -1, 4, symmetric=True)
    assert found["qweight"].tolist() == [[0x87654321 - 2**32] * 8]
    assert found["qzeros"].tolist() == [[0x77777777]]  # 8 less one
    assert found["g_idx"].tolist() == [0] * 8


def test_gptq_zero_point_zero_wraps() -> None:
    q, grid = one_row_in([0] * 8, zero=0)
    assert pack("gptq", q, grid, -1, 4, symmetric=False)["qzeros"].tolist() == [[-1]]


def test_gptq_three_bits_cross_words_by_hand() -> None:
    # All ones in values 10 (bits 30, 31 and 32) and 21 (bits 63, 64, 65); the other 30 are zero.
    q = torch.zeros(32, 32, dtype=torch.uint8)
    q[:, [10, 21]] = 7
    grid = QParams(torch.ones(32, 1), torch.ones(32, 1))
    found = pack("gptq", q, grid, -1, 3, symmetric=False)
    assert found["qweight"][:, 0].tolist() == [0xC0000000 - 2**32, 0x80000001 - 2**32, 0x00000003]
    assert found["qzeros"].tolist() == [[0, 0, 0]]


def test_compressed_tensors_words_by_hand() -> None:
    q, grid = one_row_in([1, 2, 3, 4, 5, 6, 7, 8], zero=9)
    found = pack("compressed-tensors", q, grid, -1, 4, symmetric=False, scale_dtype=torch.bfloat16)
    assert found["weight_packed"].tolist() == [[0x87654321 - 2**32]] * 8
    assert found["weight_zero_point"].tolist() == [[0x99999999 - 2**32]]
    assert found["weight_shape"].tolist() == [8, 8]
    assert found["weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_library_reads_it(bits: int, symmetric: bool) -> None:
    layer = random_layer(bits, symmetric, 24, 96, 32)  # widths that fill no whole word at some bits
    tensors = product_pack("compressed-tensors", layer, bits, symmetric, 32, scale_dtype=torch.float32)
    config = quantization_config(
        "compressed-tensors",
        method="gptq",
        bits=bits,
        group_size=32,
        symmetric=symmetric,
        desc_act=False,
        damp_percent=0.1,
        not_converted=["lm_head"],
    )
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    found = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    np.testing.assert_array_equal(found.numpy(), layer.dequantized())


def test_compressed_tensors_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(3, False, 40, 96, 32)
    whole = product_pack("compressed-tensors", layer, 3, False, 32)
    monkeypatch.setattr("llm_quantize.formats.packing._SLICE", 96 * 7)
    sliced = product_pack("compressed-tensors", layer, 3, False, 32)
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)
    np.testing.assert_array_equal(unpack("compressed-tensors", whole, 3, 32)[0].numpy(), layer.q)


def test_g_idx_is_kept() -> None:
    layer = random_layer(4, True, 32, 64, 16)
    group = torch.from_numpy(shuffled_groups(64, 16, 5)).to(torch.int32)
    found = product_pack("gptq", layer, 4, True, 16, g_idx=group)
    assert torch.equal(found["g_idx"], group)
    trivial = product_pack("gptq", layer, 4, True, 16)["g_idx"]
    assert trivial.tolist() == [i // 16 for i in range(64)]
    with pytest.raises(ValueError, match="no g_idx"):
        product_pack("awq", layer, 4, True, 16, g_idx=group)


def test_symmetric_grid_must_be_symmetric() -> None:
    with pytest.raises(ValueError, match="zero points are 8"):
        product_pack("compressed-tensors", random_layer(4, False, 8, 32, 32), 4, True, 32)


def test_wrong_grid_is_refused() -> None:
    q, grid = one_row_in([0] * 8)
    with pytest.raises(ValueError, match="8 rows of 2 groups"):
        pack("awq", q, grid, 4, 4, symmetric=True)


@pytest.mark.parametrize(
    ("layout", "bits", "group_size", "out", "width", "message"),
    [
        ("gptq", 4, 128, 64, 96, "X has 96 input channels, which 128 does not divide"),
        ("awq", 4, 32, 36, 64, "X has 36 output channels, not a multiple of 8"),
        ("gptq", 3, 16, 64, 48, "X has 48 input channels, not a multiple of 32"),
        ("gptq", 8, -1, 66, 64, "X has 66 output channels, not a multiple of 4"),
    ],
)
def test_widths_that_do_not_fit(
    layout: str, bits: int, group_size: int, out: int, width: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_shape(layout, bits, group_size, "X", out, width)
    check_shape("compressed-tensors", bits, -1, "X", out, width)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("layout", "bits", "symmetric"), CASES)
def test_quantization_config(layout: str, bits: int, symmetric: bool, group_size: int) -> None:
    found = quantization_config(
        layout,
        method="gptq",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=False,
        damp_percent=0.1,
        not_converted=["lm_head"],
    )
    assert json.loads(json.dumps(found)) == found
    expected = reference_config(layout, bits, group_size, symmetric, act_order=False)
    if layout != "compressed-tensors":
        assert found == expected
        return
    assert found.items() >= {k: v for k, v in expected.items() if k != "config_groups"}.items()
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"].items() >= expected["config_groups"]["group_0"]["weights"].items()


def test_desc_act_is_gptqs() -> None:
    shared: dict[str, Any] = {
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "desc_act": True,
        "damp_percent": 0.1,
        "not_converted": ["lm_head"],
    }
    assert quantization_config("gptq", **shared)["desc_act"] is True
    with pytest.raises(ValueError, match="no desc_act"):
        quantization_config("awq", **shared)
