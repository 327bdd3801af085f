"""Each pass on a tape of a few operations: what it rewrites, and what it must leave alone."""

from dataclasses import replace

import pytest
import torch

from penstock.kernels.cpu import passes
from penstock.kernels.cpu import tape as t
from penstock.kernels.cpu.weights import Piece
from tests.unit.kernels_recording.tape_builder import INT8, KV, TapeBuilder, kinds, weight


def gated(b: TapeBuilder, gate: t.Slice, up: t.Slice) -> t.Slice:
    out = b.buffer(gate.cols)
    b.add(t.GatedActivation(gate=gate, up=up, activation="silu", out=out))
    return out


def columns(place: t.Slice, start: int, cols: int) -> t.Slice:
    return t.Slice(buffer=place.buffer, col=start, cols=cols)


def test_gate_and_up_of_one_input_become_a_gated_product() -> None:
    b = TapeBuilder()
    x = b.scale(b.given())
    tape = passes.gate_linears(b.tape(gated(b, b.linear(x, 96), b.linear(x, 96))))
    assert kinds(tape) == ["Scale", "GatedLinear", "Convert"]
    product = tape.operations[1]
    assert isinstance(product, t.GatedLinear)
    assert (product.x, product.out.cols) == (x, 96)


def test_gate_and_up_fused_in_one_weight_of_two_pieces_become_a_gated_product() -> None:
    b = TapeBuilder()
    x, both = b.scale(b.given()), b.buffer(192)
    piece = type("Matrix", (), {"out_features": 96})()
    fused = replace(weight(192), pieces=(Piece(start=0, matrix=piece), Piece(start=96, matrix=piece)))
    b.add(t.Linear(x=x, weights=(fused,), outs=(both,)))
    tape = passes.gate_linears(b.tape(gated(b, columns(both, 0, 96), columns(both, 96, 96))))
    assert kinds(tape) == ["Scale", "GatedLinear", "Convert"]


@pytest.mark.parametrize("why", ["read twice", "other input", "in one piece"])
def test_gates_that_are_not_plain_stay(why: str) -> None:
    b = TapeBuilder()
    x = b.scale(b.given())
    if why == "in one piece":
        both = b.linear(x, 192)
        gate, up = columns(both, 0, 96), columns(both, 96, 96)
    else:
        gate, up = b.linear(x, 96), b.linear(b.scale(x) if why == "other input" else x, 96)
    out = gated(b, gate, up)
    if why == "read twice":
        b.scale(gate)
    assert "GatedLinear" not in kinds(passes.gate_linears(b.tape(out)))


def test_products_of_one_input_are_merged_at_the_first() -> None:
    b = TapeBuilder()
    x = b.norm(b.given())
    query = b.activate(b.linear(x, 96))
    key, value = b.linear(x, 32), b.linear(x, 32)
    other = b.linear(query, 32)
    b.sum(key, value)
    tape = passes.merge_linears(b.tape(other))
    assert kinds(tape) == ["RmsNorm", "Linear", "Activate", "Linear", "Sum", "Convert"]
    merged = tape.operations[1]
    assert isinstance(merged, t.Linear)
    assert [out.cols for out in merged.outs] == [96, 32, 32]


def test_the_final_copy_is_written_by_what_makes_its_source() -> None:
    b = TapeBuilder()
    tape = passes.fold_converts(b.tape(b.norm(b.given())))
    assert kinds(tape) == ["RmsNorm"]
    assert next(tape.operations[0].written()).buffer == tape.outputs[0]


def test_logits_that_are_widened_are_never_rounded() -> None:
    """The head's product, `float()`, the soft-cap and the result become one float32 buffer."""
    b = TapeBuilder()
    wide = b.buffer(dtype=torch.float32)
    b.add(t.Convert(x=b.linear(b.given()), out=wide))
    capped = b.buffer(dtype=torch.float32)
    b.add(t.Convert(x=wide, out=capped))
    b.add(t.Softcap(x=capped, cap=30.0))
    tape = passes.fold_converts(b.tape(capped, dtype=torch.float32))
    assert kinds(tape) == ["Linear", "Softcap"]
    assert {place.buffer for each in tape.operations for place in each.written()} == set(tape.outputs)


def test_a_copy_whose_source_is_read_elsewhere_stays() -> None:
    b = TapeBuilder()
    x = b.norm(b.given())
    b.scale(x)
    assert kinds(passes.fold_converts(b.tape(x))) == ["RmsNorm", "Scale", "Convert"]


def test_a_copy_that_its_source_cannot_write_wide_stays() -> None:
    b = TapeBuilder()
    wide = b.buffer(dtype=torch.float32)
    b.add(t.Convert(x=b.activate(b.given()), out=wide))
    assert kinds(passes.fold_converts(b.tape(wide, dtype=torch.float32)))[:2] == ["Activate", "Convert"]


def residual_block(b: TapeBuilder, stream: t.Slice) -> t.Slice:
    return b.sum(stream, b.linear(b.norm(stream)))


def test_products_are_added_to_the_stream_in_place_over_all_layers() -> None:
    b = TapeBuilder()
    stream = start = b.scale(b.given())
    for _ in range(3):
        stream = residual_block(b, stream)
    tape = passes.add_in_place(b.tape(b.norm(stream)))
    assert kinds(tape) == ["Scale", *["RmsNorm", "Linear"] * 3, "RmsNorm", "Convert"]
    products = [each for each in tape.operations if isinstance(each, t.Linear)]
    assert all(each.add and each.outs == (start,) for each in products)
    assert tape.operations[-2].x == start  # type: ignore[attr-defined]  # a norm, as the kinds say


def test_a_stream_that_is_read_after_the_product_is_not_changed_in_place() -> None:
    b = TapeBuilder()
    stream = b.scale(b.given())
    total = residual_block(b, stream)
    b.activate(stream)
    assert "Sum" in kinds(passes.add_in_place(b.tape(total)))


def test_a_sum_is_taken_by_the_norm_that_reads_it_first() -> None:
    b = TapeBuilder()
    first, stream = b.activate(b.given()), b.scale(b.given())
    total = b.sum(first, stream)
    normed = b.norm(total)
    tape = passes.fuse_norm_sums(b.tape(b.sum(normed, total)))
    assert kinds(tape) == ["Activate", "Scale", "RmsNorm", "Sum", "Convert"]
    norm = tape.operations[2]
    assert isinstance(norm, t.RmsNorm)
    assert (norm.x, norm.residual, norm.total) == (first, stream, total)


def test_a_sum_that_something_else_reads_before_the_norm_stays() -> None:
    b = TapeBuilder()
    total = b.sum(b.activate(b.given()), b.scale(b.given()))
    b.scale(total)
    assert kinds(passes.fuse_norm_sums(b.tape(b.norm(total)))).count("Sum") == 1


def attention_block(b: TapeBuilder, *, fused: bool = False) -> t.Slice:
    x, angles = b.given(), b.buffer(32, dtype=torch.float32)
    if fused:
        every = b.linear(x, 128)
        query, keys, values = columns(every, 0, 64), columns(every, 64, 32), columns(every, 96, 32)
    else:
        query, keys, values = b.linear(x, 64), b.linear(x, 32), b.linear(x, 32)
    turned_query, turned_keys, out = b.buffer(64), b.buffer(32), b.buffer(64)
    b.add(t.Rope(x=query, head_dim=32, angles=angles, out=turned_query))
    b.add(t.Rope(x=keys, head_dim=32, angles=angles, out=turned_keys))
    b.add(t.WriteKv(keys=turned_keys, values=values, layer=0, kv=KV))
    attention = t.Attention(
        query=turned_query, layer=0, num_heads=2, kv=KV, scale=1.0, window=0, softcap=0.0, out=out
    )
    b.add(attention)
    return out


@pytest.mark.parametrize("fused", [False, True])
def test_rotations_and_the_write_become_one_operation(fused: bool) -> None:
    """Also where query, keys and values are columns of one product."""
    b = TapeBuilder()
    tape = passes.fuse_rope_writes(b.tape(attention_block(b, fused=fused)))
    assert kinds(tape)[-3:] == ["RopeWriteKv", "Attention", "Convert"]
    assert "Rope" not in kinds(tape)
    write, attention = tape.operations[-3], tape.operations[-2]
    assert isinstance(write, t.RopeWriteKv)
    assert isinstance(attention, t.Attention)
    assert attention.query == write.query
    assert [place.buffer for place in write.written()] == [write.query.buffer]


def test_a_rotated_query_that_something_else_reads_is_not_rotated_in_place() -> None:
    b = TapeBuilder()
    out = attention_block(b)
    rope = next(each for each in b.operations if isinstance(each, t.Rope))
    b.scale(rope.x)
    assert "RopeWriteKv" not in kinds(passes.fuse_rope_writes(b.tape(out)))


def test_a_norm_whose_only_readers_are_quantized_products_writes_int8() -> None:
    b = TapeBuilder()
    x = b.norm(b.given())
    b.sum(b.linear(x, quantization=INT8), b.linear(x, quantization=INT8))
    tape = passes.fuse_quantizes(passes.quantize_inputs(b.tape(b.given())))
    assert kinds(tape)[:3] == ["RmsNorm", "Linear", "Linear"]
    norm, first, second = tape.operations[:3]
    assert isinstance(norm, t.RmsNorm)
    assert isinstance(norm.out, t.Quantized)
    assert norm.out == first.x == second.x  # type: ignore[attr-defined]  # products, as the kinds say
    dtypes = [tape.buffers[place.buffer].dtype for place in t.slices(norm.out)]
    assert dtypes == [torch.int8, torch.float32, torch.int32]


def test_inputs_that_others_read_too_are_quantized_once_beside_them() -> None:
    b = TapeBuilder()
    x = b.norm(b.given())
    b.scale(x)
    b.sum(b.linear(x, quantization=INT8), b.linear(x, quantization=INT8))
    tape = passes.fuse_quantizes(passes.quantize_inputs(b.tape(b.given())))
    assert kinds(tape)[:5] == ["RmsNorm", "Scale", "Quantize", "Linear", "Linear"]


def test_the_stream_is_kept_wide_and_what_products_read_is_not() -> None:
    b = TapeBuilder()
    stream = b.scale(b.given())
    normed = b.norm(stream)
    total = b.sum(stream, b.linear(normed))
    tape = passes.widen_stream(b.tape(b.norm(total)))
    wide = {n for n, buffer in enumerate(tape.buffers) if buffer.dtype == torch.float32}
    assert {stream.buffer, total.buffer} <= wide
    assert normed.buffer not in wide
    assert not wide & {*tape.inputs, *tape.outputs}


@pytest.mark.parametrize(("start", "cols", "copied"), [(0, 40, True), (64, 64, False)])
def test_columns_that_end_inside_a_group_are_copied_before_a_product(
    start: int, cols: int, copied: bool
) -> None:
    b = TapeBuilder()
    x = columns(b.buffer(128), start, cols)
    tape = passes.isolate_operands(b.tape(b.linear(x)))
    assert (kinds(tape)[0] == "Convert") is copied


def test_buffers_whose_lives_do_not_meet_share_memory() -> None:
    b = TapeBuilder()
    x = b.given()
    for _ in range(6):
        x = b.activate(x)
    tape = passes.drop_unused(passes.reuse_buffers(b.tape(x)))
    own = [buffer for buffer in tape.buffers if buffer.role is t.Role.OWN]
    assert len(own) == 2
    for operation in tape.operations:
        read, written = ({place.buffer for place in each} for each in (operation.read(), operation.written()))
        assert not read & written


def test_buffers_of_other_widths_or_dtypes_are_not_shared() -> None:
    """The zeros behind a row's last value must stay zeros."""
    b = TapeBuilder()
    x = b.linear(b.linear(b.linear(b.given(), 96), 32), 48)
    tape = passes.drop_unused(passes.reuse_buffers(b.tape(x)))
    assert sum(buffer.role is t.Role.OWN for buffer in tape.buffers) == 3
