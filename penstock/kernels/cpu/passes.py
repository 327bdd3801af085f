"""Rewrites a tape into fewer and wider operations; each pass is one function from tape to tape.

`optimize` composes them in the order in which they stand here. A pass keeps what the tape computes; where
it keeps more digits than the recording had (sums and logits in float32), its docstring says so.
"""

from dataclasses import replace
from typing import Final

import torch

from penstock.kernels.cpu.rewriting import Rewriting, Uses, is_own
from penstock.kernels.cpu.tape import (
    Activate,
    Attention,
    Buffer,
    Convert,
    Embedding,
    GatedActivation,
    GatedLinear,
    LayerNorm,
    Linear,
    Lora,
    Moe,
    Operation,
    Quantize,
    Quantized,
    RmsNorm,
    Role,
    Rope,
    RopeWriteKv,
    Scale,
    Slice,
    Softcap,
    Sum,
    Tape,
    WriteKv,
)
from penstock.kernels.cpu.weights import PackedLinear

WIDE: Final = (RmsNorm, LayerNorm, Embedding, Sum, Scale, Convert, Softcap)
"""What reads and writes bfloat16 and float32 alike."""
OPERAND_ALIGNMENT: Final = 64
"""Inputs of a product are read in groups of so many values (`matrix.h`), zeros behind the last."""
SUM_GROUP: Final = 32
"""Values of a quantized row that share a sum (`linear.h`)."""


def without_adapters(tape: Tape) -> Tape:
    """The base model alone: for steps in which no row has an adapter."""
    kept = tuple(each for each in tape.operations if not isinstance(each, Lora))
    return replace(tape, operations=kept)


def attach_adapters(tape: Tape) -> Tape:
    """Where adapters act is noted at the products, so that the passes in between join them as ever."""
    rewriting = Rewriting(tape)
    makers: dict[Slice, int] = {}
    for i, operation in enumerate(tape.operations):
        if isinstance(operation, Linear):
            makers[operation.outs[0]] = i
        if isinstance(operation, Lora) and operation.outs[0] in makers:
            made = makers[operation.outs[0]]
            linear = rewriting.current(made)
            assert isinstance(linear, Linear)
            rewriting.put(made, replace(linear, sites=operation.sites))
            rewriting.drop(i)
    return rewriting.apply()


def _gate_and_up(
    tape: Tape, uses: Uses, index: int, operation: GatedActivation
) -> tuple[PackedLinear, PackedLinear, list[int]] | None:
    """The weights behind both inputs of a gated activation, and the products that go."""
    sources = [uses.only_writer(place.buffer) for place in (operation.gate, operation.up)]
    if None in sources or not all(
        uses.is_read_by(place.buffer, index) for place in (operation.gate, operation.up)
    ):
        return None
    first, second = (tape.operations[source] for source in sources if source is not None)
    if not isinstance(first, Linear) or not isinstance(second, Linear) or first.x != second.x:
        return None
    if first.sites or second.sites:  # adapters add to both before the gate
        return None
    if first is not second:
        is_plain = tape.is_whole(operation.gate) and tape.is_whole(operation.up)
        found = (first.weights[0], second.weights[0]) if is_plain else None
    else:
        half = first.weights[0].out_features // 2
        halves = first.weights[0].part(0, half), first.weights[0].part(half, half)
        is_split = (operation.gate.col, operation.up.col) == (0, half) and operation.gate.cols == half
        found = (halves[0], halves[1]) if is_split and halves[0] and halves[1] else None
    if found is None or found[0].takes_int8 != found[1].takes_int8:
        return None
    return (*found, sorted({source for source in sources if source is not None}))


def gate_linears(tape: Tape) -> Tape:
    """`activation(gate(x)) * up(x)` becomes one operation, also where both come from one fused weight."""
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, GatedActivation) or not isinstance(operation.out, Slice):
            continue
        found = _gate_and_up(tape, uses, i, operation)
        if found is None:
            continue
        gate, up, gone = found
        source = tape.operations[gone[0]]
        assert isinstance(source, Linear)
        for index in gone:
            rewriting.drop(index)
        rewriting.put(
            i,
            GatedLinear(x=source.x, gate=gate, up=up, activation=operation.activation, out=operation.out),
        )
    return rewriting.apply()


def merge_linears(tape: Tape) -> Tape:
    """Products of the same x (query, key and value) become one operation at the place of the first."""
    rewriting = Rewriting(tape)
    first_of: dict[tuple[object, bool, bool], int] = {}
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Linear) or operation.add:
            continue
        kind = (operation.x, operation.weights[0].takes_int8, bool(operation.sites))
        first = first_of.setdefault(kind, i)
        if first != i:
            before = rewriting.current(first)
            assert isinstance(before, Linear)
            both = replace(
                before,
                weights=before.weights + operation.weights,
                outs=before.outs + operation.outs,
                sites=before.sites + operation.sites,
            )
            rewriting.put(first, both)
            rewriting.drop(i)
    return rewriting.apply()


def _takes_wide(operation: Operation, buffer: int) -> bool:
    """True if the operation can read or write that buffer in float32 as well as in bfloat16."""
    if isinstance(operation, Linear):
        return not any(place.buffer == buffer for place in _inputs(operation))
    if isinstance(operation, Moe):
        return operation.x.buffer != buffer
    return isinstance(operation, WIDE)


def _inputs(operation: Linear) -> list[Slice]:
    return [operation.x] if isinstance(operation.x, Slice) else []


def fold_converts(tape: Tape) -> Tape:
    """A copy whose source nobody else reads goes: the source is written where the copy would be.

    Where the copy widens to float32, the source is not rounded to bfloat16 any more.
    """
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Convert) or not is_own(tape, operation.x):
            continue
        if tape.is_whole(operation.out) and _can_fold(tape, uses, i, operation):
            rewriting.drop(i)
            rewriting.renamed[operation.x.buffer] = operation.out.buffer
    return rewriting.apply()


def _can_fold(tape: Tape, uses: Uses, index: int, operation: Convert) -> bool:
    source, target = operation.x.buffer, operation.out.buffer
    touching = {*uses.writers[source], *uses.readers[source]} - {index}
    in_place = [i for i in touching if isinstance(tape.operations[i], Softcap)]
    is_lone = len(touching) == len(in_place) + 1 and all(i < index for i in touching)
    if not is_lone or uses.writers[target][0] != index:
        return False
    if tape.buffers[source].dtype == tape.buffers[target].dtype:
        return True
    return all(_takes_wide(tape.operations[i], source) for i in touching)


def add_in_place(tape: Tape) -> Tape:
    """A product that is only added to the residual stream is added there at once.

    The stream is then one buffer from the first layer to the last.
    """
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Sum):
            continue
        for term, stream in ((operation.a, operation.b), (operation.b, operation.a)):
            source = _addable(tape, uses, i, term=term, stream=stream)
            if source is None or not is_own(tape, operation.out):
                continue
            rewriting.put(source, _adding(tape.operations[source], stream))
            rewriting.drop(i)
            rewriting.renamed[operation.out.buffer] = stream.buffer
            break
    return rewriting.apply()


def _addable(tape: Tape, uses: Uses, index: int, *, term: Slice, stream: Slice) -> int | None:
    """The product that makes `term`, if it may be added to `stream` where it stands."""
    source = uses.only_writer(term.buffer)
    if source is None or not uses.is_read_by(term.buffer, index):
        return None
    if not is_own(tape, term) or not is_own(tape, stream):
        return None
    operation = tape.operations[source]
    is_single = isinstance(operation, Linear) and len(operation.outs) == 1
    if not (is_single or isinstance(operation, Moe)):
        return None
    others = [i for i in uses.readers[stream.buffer] if i != index]
    is_free = all(i < source for i in others) and all(i < source for i in uses.writers[stream.buffer])
    return source if is_free else None


def _adding(operation: Operation, stream: Slice) -> Operation:
    if isinstance(operation, Linear):
        return replace(operation, outs=(stream,), add=True)
    assert isinstance(operation, Moe)
    return replace(operation, out=stream, add=True)


def fuse_norm_sums(tape: Tape) -> Tape:
    """A sum whose first reader is a norm is taken by the norm."""
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Sum) or not uses.readers[operation.out.buffer]:
            continue
        first = uses.readers[operation.out.buffer][0]
        norm = tape.operations[first]
        if not isinstance(norm, RmsNorm | LayerNorm) or norm.x != operation.out:
            continue
        is_row = isinstance(norm, LayerNorm) or norm.group == norm.x.cols
        between = range(i, first + 1)
        is_same = not any(w in between for place in operation.read() for w in uses.writers[place.buffer])
        if is_row and is_same and norm.residual is None and uses.only_writer(operation.out.buffer) == i:
            rewriting.drop(i)
            rewriting.put(first, replace(norm, x=operation.a, residual=operation.b, total=operation.out))
    return rewriting.apply()


def _overlap(first: Slice, second: Slice) -> bool:
    if first.buffer != second.buffer:
        return False
    return first.col < second.col + second.cols and second.col < first.col + first.cols


def _reads_alone(tape: Tape, uses: Uses, reader: int, place: Slice) -> bool:
    """True if no other operation reads any of these columns."""
    return not any(
        _overlap(place, other)
        for i in uses.readers[place.buffer]
        if i != reader
        for other in tape.operations[i].read()
    )


def _rope_of_query(
    tape: Tape, uses: Uses, write: int, *, layer: int, angles: Slice
) -> tuple[int, int] | None:
    """(rope, attention): the rotation of the query of the layer's attention, if nothing else reads it."""
    for i in range(write + 1, len(tape.operations)):
        attention = tape.operations[i]
        if isinstance(attention, Attention) and attention.layer == layer:
            rope = uses.only_writer(attention.query.buffer)
            if rope is None or rope > write or not uses.is_read_by(attention.query.buffer, i):
                return None
            operation = tape.operations[rope]
            is_rope = isinstance(operation, Rope) and operation.angles == angles
            return (rope, i) if is_rope and attention.query == next(operation.written()) else None
    return None


def fuse_rope_writes(tape: Tape) -> Tape:
    """Rotation of query and keys and the write of keys and values become one operation."""
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, write in enumerate(tape.operations):
        if not isinstance(write, WriteKv):
            continue
        source = uses.only_writer(write.keys.buffer)
        rope = None if source is None else tape.operations[source]
        if not isinstance(rope, Rope) or rope.out != write.keys or not uses.is_read_by(rope.out.buffer, i):
            continue
        found = _rope_of_query(tape, uses, i, layer=write.layer, angles=rope.angles)
        if source is None or found is None:
            continue
        query, attention = tape.operations[found[0]], tape.operations[found[1]]
        assert isinstance(query, Rope)
        assert isinstance(attention, Attention)
        if not _reads_alone(tape, uses, found[0], query.x):
            continue
        rewriting.drop(source)
        rewriting.drop(found[0])
        rewriting.put(found[1], replace(attention, query=query.x))
        rewriting.put(
            i,
            RopeWriteKv(
                query=query.x,
                keys=rope.x,
                values=write.values,
                angles=rope.angles,
                layer=write.layer,
                kv=write.kv,
            ),
        )
    return rewriting.apply()


def _int8_input(operation: Operation) -> Slice | None:
    """The input that an operation wants quantized."""
    if isinstance(operation, Linear) and operation.weights[0].takes_int8 and isinstance(operation.x, Slice):
        return operation.x
    if isinstance(operation, GatedLinear) and operation.gate.takes_int8 and isinstance(operation.x, Slice):
        return operation.x
    return None


def _quantized_buffers(rewriting: Rewriting, cols: int) -> Quantized:
    groups = -(-cols // OPERAND_ALIGNMENT) * (OPERAND_ALIGNMENT // SUM_GROUP)
    return Quantized(
        values=rewriting.add_buffer(Buffer(dtype=torch.int8, cols=cols)),
        scales=rewriting.add_buffer(Buffer(dtype=torch.float32, cols=1)),
        sums=rewriting.add_buffer(Buffer(dtype=torch.int32, cols=groups)),
    )


def _can_quantize(operation: Operation, x: Slice) -> bool:
    """True if the operation that makes x can write it quantized."""
    if isinstance(operation, RmsNorm):
        return operation.out == x and operation.group == x.cols
    return isinstance(operation, LayerNorm | Activate | GatedActivation) and operation.out == x


def quantize_inputs(tape: Tape) -> Tape:
    """Inputs of products with int8 activations are quantized by an operation before the first of them."""
    rewriting = Rewriting(tape)
    made: dict[Slice, Quantized] = {}
    for i, operation in enumerate(tape.operations):
        x = _int8_input(operation)
        if x is None:
            continue
        extra: list[Operation] = []
        if x not in made:
            made[x] = _quantized_buffers(rewriting, x.cols)
            extra = [Quantize(x=x, out=made[x])]
        rewriting.put(i, *extra, _reading(operation, made[x]))
    return rewriting.apply()


def fuse_quantizes(tape: Tape) -> Tape:
    """What is only quantized is written quantized, and not rounded to bfloat16 in between."""
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Quantize):
            continue
        writer = uses.only_writer(operation.x.buffer)
        is_alone = tape.is_whole(operation.x) and uses.is_read_by(operation.x.buffer, i)
        if writer is not None and is_alone and _can_quantize(tape.operations[writer], operation.x):
            rewriting.put(writer, _writing(tape.operations[writer], operation.out))
            rewriting.drop(i)
    return rewriting.apply()


def _writing(operation: Operation, out: Quantized) -> Operation:
    assert isinstance(operation, RmsNorm | LayerNorm | Activate | GatedActivation)
    return replace(operation, out=out)


def _reading(operation: Operation, x: Quantized) -> Operation:
    assert isinstance(operation, Linear | GatedLinear)
    return replace(operation, x=x)


def widen_stream(tape: Tape) -> Tape:
    """Sums and what only norms and sums read is kept in float32, where the recording rounds to bfloat16."""
    uses = Uses.of(tape)
    buffers = list(tape.buffers)
    for number, buffer in enumerate(buffers):
        touching = {*uses.readers[number], *uses.writers[number]}
        is_narrow = buffer.dtype == torch.bfloat16 and buffer.role is Role.OWN
        if is_narrow and touching and all(_takes_wide(tape.operations[i], number) for i in touching):
            buffers[number] = replace(buffer, dtype=torch.float32)
    return replace(tape, buffers=tuple(buffers))


def detach_adapters(tape: Tape) -> Tape:
    """Adapters become operations again, one after each product (or join of products) that they act on.

    Before inputs are quantized: adapters read them as they are.
    """
    rewriting = Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if isinstance(operation, Linear) and operation.sites:
            assert isinstance(operation.x, Slice), "adapters read what is not quantized yet"
            added = Lora(x=operation.x, sites=operation.sites, outs=operation.outs)
            rewriting.put(i, replace(operation, sites=()), added)
    return rewriting.apply()


def isolate_operands(tape: Tape) -> Tape:
    """Inputs of a product that end inside a group are copied to where zeros follow: it reads to the end."""
    rewriting = Rewriting(tape)
    for i, operation in enumerate(tape.operations):
        if not isinstance(operation, Linear | GatedLinear | Moe):
            continue
        x = operation.x
        if not isinstance(x, Slice) or is_own(tape, x) or x.cols % OPERAND_ALIGNMENT == 0:
            continue
        copy = rewriting.add_buffer(Buffer(dtype=tape.buffers[x.buffer].dtype, cols=x.cols))
        rewriting.put(i, Convert(x=x, out=copy), replace(operation, x=copy))
    return rewriting.apply()


def reuse_buffers(tape: Tape) -> Tape:
    """Buffers whose lives do not meet share memory, if dtype and columns are the same.

    The same columns, since the zeros behind a row's last value must stay zeros.
    """
    uses, rewriting = Uses.of(tape), Rewriting(tape)
    lives = {
        number: (
            min(uses.writers[number] + uses.readers[number]),
            max(uses.writers[number] + uses.readers[number]),
        )
        for number, buffer in enumerate(tape.buffers)
        if buffer.role is Role.OWN and uses.writers[number] + uses.readers[number]
    }
    free: dict[tuple[torch.dtype, int], list[tuple[int, int]]] = {}
    for number in sorted(lives, key=lambda each: lives[each]):
        buffer, (born, died) = tape.buffers[number], lives[number]
        shelf = free.setdefault((buffer.dtype, buffer.cols), [])
        kept = next((place for place in shelf if place[0] < born), None)
        if kept is None:
            shelf.append((died, number))
        else:
            shelf.remove(kept)
            shelf.append((died, kept[1]))
            rewriting.renamed[number] = kept[1]
    return rewriting.apply()


def drop_unused(tape: Tape) -> Tape:
    """Buffers that no operation touches go; the others move up."""
    used = {place.buffer for each in tape.operations for place in (*each.read(), *each.written())}
    kept = [n for n, each in enumerate(tape.buffers) if n in used or each.role is Role.EXTERNAL]
    number = {old: new for new, old in enumerate(kept)}
    return Tape(
        buffers=tuple(tape.buffers[old] for old in kept),
        operations=tuple(
            each.moved(lambda place: replace(place, buffer=number[place.buffer])) for each in tape.operations
        ),
        inputs=tuple(number[old] for old in tape.inputs),
        outputs=tuple(number[old] for old in tape.outputs),
    )


PASSES: Final = (
    attach_adapters,
    gate_linears,
    merge_linears,
    fold_converts,
    add_in_place,
    fuse_norm_sums,
    fuse_rope_writes,
    widen_stream,
    detach_adapters,
    quantize_inputs,
    fuse_quantizes,
    isolate_operands,
    reuse_buffers,
    drop_unused,
)
"""All of them, in their order."""
NEEDS: Final = (quantize_inputs, isolate_operands, reuse_buffers, drop_unused)
"""Those without which a tape cannot be emitted."""


def optimize(tape: Tape) -> Tape:
    """All passes."""
    for each in PASSES:
        tape = each(tape)
    return tape


def lower(tape: Tape) -> Tape:
    """The needed passes only: the same roundings as the operations one by one."""
    for each in NEEDS:
        tape = each(tape)
    return tape
