"""Test the independent packers against words written by hand, and against the compressed-tensors library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from transformers import Qwen2Config, Qwen2ForCausalLM

from reference import (
    Ints,
    Layer,
    dequantize_directory,
    groups_in_order,
    pack_awq,
    pack_compressed_tensors,
    pack_gptq,
    plain_model,
    read_tensors,
    round_to_nearest,
    shuffled_groups,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
    write_rtn_checkpoint,
)


def layer_of(q: Ints, zeros: Ints) -> Layer:
    """Make a layer of one group over all columns, with scale 1."""
    return Layer(
        q=q, zeros=zeros, scales=np.ones(zeros.shape, np.float32), group=np.zeros(q.shape[1], np.int64)
    )


def random_layer(bits: int, group_size: int, seed: int = 0, shuffle: bool = False) -> Layer:
    """Make a layer of 64 × 96 random integers and zero points of all values."""
    rng = np.random.default_rng(seed)
    group = shuffled_groups(96, group_size, seed) if shuffle else groups_in_order(96, group_size)
    count = int(group.max()) + 1
    return Layer(
        q=rng.integers(0, 2**bits, (64, 96)),
        zeros=rng.integers(0, 2**bits, (64, count)),
        scales=rng.uniform(0.01, 1, (64, count)).astype(np.float16).astype(np.float32),
        group=group,
    )


def same(one: Layer, other: Layer) -> bool:
    return (
        np.array_equal(one.q, other.q)
        and np.array_equal(one.zeros, other.zeros)
        and np.array_equal(one.scales, other.scales)
        and np.array_equal(one.group, other.group)
    )


def words(array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> list[int]:
    """Return all words, unsigned, in the order of memory."""
    assert array.dtype == np.int32
    return [int(word) & 0xFFFFFFFF for word in np.ascontiguousarray(array).ravel()]


def test_awq_words() -> None:
    # Two input channels, eight outputs: output k of channel 0 is k, of channel 1 it is 15 − k.
    q = np.stack([np.arange(8), 15 - np.arange(8)], axis=1)
    packed = pack_awq(layer_of(q, np.arange(8)[:, None] + 8))
    assert words(packed["qweight"]) == [0x75316420, 0x8ACE9BDF]
    assert packed["qweight"].shape == (2, 1)
    # Zero points as they are, in the same order.
    assert words(packed["qzeros"]) == [0xFDB9ECA8]
    assert packed["scales"].shape == (1, 8)


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (2, [0, 1, 2, 3] * 4, [0xE4E4E4E4]),
        (4, [0, 1, 2, 3, 4, 5, 6, 15], [0xF6543210]),
        (8, [0x11, 0x22, 0x33, 0xFE], [0xFE332211]),
        # Values 10 and 21 lie across borders: 10 = 0b101 puts 01 at the end of the first word and 1 at the
        # start of the second, 21 = 0b110 puts 0 at the end of the second and 11 at the start of the third.
        (3, [0] * 10 + [5] + [0] * 21, [0x40000000, 0x00000001, 0]),
        (3, [0] * 21 + [6] + [0] * 10, [0, 0, 0x00000003]),
        (3, [1] + [0] * 20 + [1] + [0] * 9 + [7], [0x00000001, 0x80000000, 0xE0000000]),
    ],
)
def test_gptq_words(bits: int, values: list[int], expected: list[int]) -> None:
    # 32 outputs, all the same, each a column of words.
    q = np.tile(np.array(values), (32, 1))
    packed = pack_gptq(layer_of(q, np.ones((32, 1), np.int64)), bits)
    assert packed["qweight"].shape == (len(expected), 32)
    assert words(packed["qweight"][:, 0]) == expected
    # Zero point 1 is stored as 0.
    assert words(packed["qzeros"]) == [0] * bits
    # The same stream runs along the outputs for zero points, one less than they are.
    count = len(values)
    zeros = (np.array(values)[:, None] + 1) % 2**bits
    turned = pack_gptq(layer_of(np.zeros((count, 32), np.int64), zeros), bits)
    assert words(turned["qzeros"]) == expected
    assert words(turned["g_idx"]) == [0] * 32


def test_gptq_zero_point_zero_wraps() -> None:
    packed = pack_gptq(layer_of(np.zeros((8, 32), np.int64), np.zeros((8, 1), np.int64)), 4)
    assert words(packed["qzeros"]) == [0xFFFFFFFF]
    assert not unpack_gptq(packed, 4).zeros.any()


def test_compressed_tensors_words() -> None:
    # The library's −8 … −1 of output 0 and 0 … 7 of output 1.
    q = np.stack([np.arange(8), np.arange(8) + 8])
    packed = pack_compressed_tensors(layer_of(q, np.array([[3], [9]])), 4, sym=False)
    assert words(packed["weight_packed"]) == [0x76543210, 0xFEDCBA98]
    assert words(packed["weight_zero_point"]) == [0x00000093]
    assert packed["weight_shape"].tolist() == [2, 8]
    assert "weight_zero_point" not in pack_compressed_tensors(layer_of(q, np.full((2, 1), 8)), 4, sym=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [96, 40])
def test_compressed_tensors_words_are_the_librarys(bits: int, width: int) -> None:
    layer = random_layer(bits, 32)
    q = layer.q[:, :width]
    ours = pack_compressed_tensors(layer_of(q, layer.zeros), bits, sym=False)
    signed = torch.from_numpy(q - 2 ** (bits - 1)).to(torch.int8)
    signed_zeros = torch.from_numpy(layer.zeros - 2 ** (bits - 1)).to(torch.int8)
    assert np.array_equal(ours["weight_packed"], pack_to_int32(signed, bits).numpy())
    assert np.array_equal(ours["weight_zero_point"], pack_to_int32(signed_zeros, bits, packed_dim=0).numpy())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_unpackers_undo_packers(bits: int, group_size: int) -> None:
    layer = random_layer(bits, group_size)
    assert same(unpack_gptq(pack_gptq(layer, bits), bits), layer)
    assert same(
        unpack_compressed_tensors(pack_compressed_tensors(layer, bits, sym=False), bits, group_size), layer
    )
    shuffled = random_layer(bits, group_size, shuffle=True)
    assert same(unpack_gptq(pack_gptq(shuffled, bits), bits), shuffled)
    if bits == 4:
        assert same(unpack_awq(pack_awq(layer), group_size), layer)


def test_old_three_bit_packing_is_refused() -> None:
    # compressed-tensors before 0.18 put ten 3-bit values into a word: 96 columns in 10 words, not 9.
    packed = pack_compressed_tensors(random_layer(3, 32), 3, sym=False)
    packed["weight_packed"] = np.zeros((64, 10), np.int32)
    with pytest.raises(ValueError, match="does not hold 3 bits"):
        unpack_compressed_tensors(packed, 3, 32)


def test_dequantized_by_hand() -> None:
    layer = Layer(
        q=np.array([[0, 15, 7, 8]]),
        zeros=np.array([[8, 3]]),
        scales=np.array([[0.5, 2.0]], np.float32),
        group=np.array([0, 1, 0, 1]),
    )
    assert layer.dequantized().tolist() == [[-4.0, 24.0, -0.5, 10.0]]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_is_within_half_a_step(bits: int, sym: bool) -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(0.1, 1, (16, 64)).astype(np.float32)
    layer = round_to_nearest(weight, bits, sym, groups_in_order(64, 32))
    inside = (layer.q > 0) & (layer.q < 2**bits - 1)
    step = layer.scales[:, layer.group]
    assert (np.abs(layer.dequantized() - weight) <= step / 2 * 1.001)[inside].all()
    assert (np.abs(layer.dequantized() - weight) <= step * 1.02).all()
    assert (layer.zeros == 2 ** (bits - 1)).all() == sym


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small bfloat16 Qwen2 with biases and tied embeddings."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source")
    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.Module.bfloat16(model).save_pretrained(path)
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("format_name", "bits", "sym", "act_order"),
    [
        ("awq", 4, False, False),
        ("gptq", 3, True, False),
        ("gptq", 4, False, True),
        ("compressed-tensors", 8, True, False),
        ("compressed-tensors", 3, False, False),
    ],
)
def test_directory_round_trip(
    source: Path, tmp_path: Path, format_name: str, bits: int, sym: bool, act_order: bool, shards: int
) -> None:
    write_rtn_checkpoint(source, tmp_path, format_name, bits, 32, sym, act_order=act_order, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    state = dequantize_directory(tmp_path)
    before, _ = read_tensors(source)
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert state[name].dtype == np.float32
        if name.endswith("_proj.weight"):
            gap = float(np.abs(state[name] - tensor).max() / np.abs(tensor).max())
            assert 0 < gap < 1.4 / 2**bits, name
        else:
            assert np.array_equal(state[name], tensor), name
    model = plain_model(tmp_path)
    assert model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy() == pytest.approx(
        state["model.layers.1.mlp.down_proj.weight"], abs=0
    )
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64


def test_directory_that_contradicts_its_config_is_refused(source: Path, tmp_path: Path) -> None:
    write_rtn_checkpoint(source, tmp_path, "compressed-tensors", 4, 32, False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="symmetric is True"):
        dequantize_directory(tmp_path)
