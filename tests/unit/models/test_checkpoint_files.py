"""Damaged checkpoint files are refused in one line that names file, tensor, expected and found."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import CheckpointError
from penstock.models.checkpoint import open_checkpoint, read_entries
from penstock.observe.memory import resident_bytes
from tests.unit.models.safetensors_file import file_bytes, header_of, write

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_entries(path) if path.is_file() else open_checkpoint(path)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3
    return caught.value.message


def test_tensors_are_read_back_without_a_copy(tmp_path: Path) -> None:
    """Two tensors of a file lie in memory as far apart as in the file: both are views of one map."""
    write(tmp_path / "model.safetensors", TENSORS)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"a", "b"}
    entries = [checkpoint.entry(name, shape=tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    first, second = (checkpoint.read(entry) for entry in entries)
    assert torch.equal(first, TENSORS["a"])
    assert torch.equal(second, TENSORS["b"])
    assert second.data_ptr() - first.data_ptr() == entries[1].start - entries[0].start


def test_a_released_tensor_is_no_longer_resident_and_reads_the_same_again(tmp_path: Path) -> None:
    """What the kernels have packed need not stay in memory beside the pack."""
    size = 32 << 20
    write(tmp_path / "model.safetensors", {"a": torch.ones(size // 4), "b": torch.ones(4)})
    checkpoint = open_checkpoint(tmp_path)
    big = checkpoint.read(checkpoint.entry("a", shape=(size // 4,)))
    small = checkpoint.read(checkpoint.entry("b", shape=(4,)))
    assert checkpoint.is_mapped(big)
    assert not checkpoint.is_mapped(torch.ones(4))
    before = resident_bytes()
    checkpoint.release(torch.ones(4))
    assert before - resident_bytes() < size // 4
    checkpoint.release(big)
    assert before - resident_bytes() > size * 3 // 4
    assert bool((big[:: 1 << 20] == 1).all())
    assert small.tolist() == [1, 1, 1, 1]


def test_an_unaligned_header_is_read_too(tmp_path: Path) -> None:
    header, data = header_of(TENSORS)
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        (tmp_path / "model.safetensors").write_bytes(file_bytes(text, data))
        checkpoint = open_checkpoint(tmp_path)
        assert torch.equal(checkpoint.read(checkpoint.entry("a", shape=(2, 3))), TENSORS["a"])


def test_a_truncated_file_names_the_tensor_that_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[:-3])
    assert (
        refused(path)
        == "model.safetensors: tensor 'b': ends at byte 32 of the data, the file has 29: it is truncated"
    )


@pytest.mark.parametrize("length", [0, 5, 8, 12])
def test_a_file_cut_within_the_header_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "model.safetensors", TENSORS)
    path.write_bytes(path.read_bytes()[:length])
    assert refused(path).startswith("model.safetensors: header length is")


def test_a_huge_header_length_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    assert "header length is 18446744073709551615, at most 2 bytes are possible" in refused(path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "bad header"),
        (b"\xff\xfe", "bad header"),
        (b"[]", "expected a JSON object"),
        (b"[" * 100_000, "bad header"),
        (b'{"t": 1, "t": 2}', "key 't' stands there twice"),
        ({"t": 3}, "tensor 't': bad header: expected an object"),
        (entry(dtype="F33"), "tensor 't': dtype 'F33' is not known"),
        (entry(dtype=["F32"]), "tensor 't': dtype"),
        (entry(shape=[-1]), "tensor 't': bad shape [-1]"),
        (entry(shape=[True, 2]), "tensor 't': bad shape"),
        (entry(shape="2"), "tensor 't': bad shape"),
        (entry(shape=[1] * 9), "tensor 't': bad shape"),
        (entry(shape=[1 << 60, 1 << 60]), "tensor 't': bad shape"),
        (entry(shape=[3]), "tensor 't': expected 12 bytes for F32 [3], data_offsets hold 8"),
        (entry(data_offsets=[8, 0]), "tensor 't': expected 8 bytes"),
        (entry(data_offsets=[0]), "tensor 't': bad data_offsets"),
        (entry(data_offsets=[0.0, 8.0]), "tensor 't': bad data_offsets"),
        (entry(data_offsets=[4, 12]), "tensor 't': ends at byte 12 of the data, the file has 8"),
        ({**entry(), "u": entry()["t"]}, "tensor 'u': overlaps"),
    ],
)
def test_each_damage_of_a_header_is_named(tmp_path: Path, header: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(header, b"\0" * 8))
    assert message in refused(path)


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_flipped_bytes_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    """It refuses with its own error, or the flip made another valid file."""
    header, data = header_of(TENSORS)
    raw = bytearray(file_bytes(header, data))
    for place, value in flips:
        raw[place % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(raw)
    try:
        entries = read_entries(path)
    except CheckpointError:
        return
    assert all(entry.start + entry.num_bytes <= len(raw) for entry in entries.values())


def sharded(folder: Path, *, weight_map: dict[str, str] | None = None) -> Path:
    write(folder / "one.safetensors", {"a": TENSORS["a"]})
    write(folder / "two.safetensors", {"b": TENSORS["b"]})
    weight_map = weight_map or {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert torch.equal(checkpoint.read(checkpoint.entry("b", shape=(4,))), TENSORS["b"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    assert "shard two.safetensors is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "one.bin", ""])
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, name: str) -> None:
    assert "not a plain *.safetensors file name" in refused(sharded(tmp_path, weight_map={"a": name}))


def test_a_tensor_that_the_index_promises_and_the_shard_lacks_is_named(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    assert "two.safetensors: tensor 'c'" in refused(sharded(tmp_path, weight_map=weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write(sharded(tmp_path) / "two.safetensors", TENSORS)
    assert "two.safetensors: tensor 'a' is in one.safetensors too" in refused(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert refused(tmp_path).startswith("model.safetensors.index.json")


def test_a_folder_with_pickles_only_says_that_they_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is there, but only safetensors are read" in refused(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent")


def test_missing_and_misshapen_and_integer_tensors_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {**TENSORS, "i": torch.ones(2, dtype=torch.int64)})
    checkpoint = open_checkpoint(tmp_path)
    for name, shape, message in (
        ("c", (2,), "tensor 'c' of shape [2] is missing from the checkpoint"),
        ("a", (3, 2), "model.safetensors: tensor 'a': expected shape [3, 2], found [2, 3]"),
        ("i", (2,), "model.safetensors: tensor 'i': expected dtype F64, F32, F16, BF16, found I64"),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoint.entry(name, shape=shape)
        assert caught.value.message == message
