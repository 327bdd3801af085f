"""Hands a tape to the extension module: buffers, then operations, one call each.

The tape must outlive the program, which holds addresses of its constants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Final, TypedDict

from penstock.kernels.batch import AttentionBatch, KvShape
from penstock.kernels.cpu import _native
from penstock.kernels.cpu import tape as t
from penstock.kernels.cpu.weights import NATIVE_DTYPES, PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What programs run on."""

    pool: _native.Pool
    isa: str
    is_deterministic: bool


def kv_format(shape: KvShape) -> str:
    """The extension's word for the dtype of a cache."""
    return "int8" if shape.is_int8 else "bf16"


USUAL_HEAD_DIM: Final = 64
"""Stands for a head size that is not known yet."""


def layout_refusal(*, block_size: int, head_dim: int | None) -> str | None:
    """Why the extension cannot arrange such blocks; None if it can."""
    try:
        _native.kv_block_bytes(
            kv_format="bf16", block_size=block_size, num_kv_heads=1, head_dim=head_dim or USUAL_HEAD_DIM
        )
    except ValueError as error:
        return str(error)
    return None


def attention_inputs(groups: Sequence[AttentionBatch]) -> list[_native.AttentionInputs]:
    """The lengths and tables of a step's cache groups; the tensors must outlive the run."""
    return [
        _native.AttentionInputs(
            num_seqs=len(group.seq_lens_host),
            query_start_loc=group.query_start_loc.data_ptr(),
            seq_lens=group.seq_lens.data_ptr(),
            block_tables=group.block_tables.data_ptr(),
            max_num_blocks=group.block_tables.shape[1],
            slot_mapping=group.slot_mapping.data_ptr(),
        )
        for group in groups
    ]


def emit(tape: t.Tape, machine: Machine) -> _native.Program:
    """The program that runs a tape; its externals are the tape's inputs, then the output."""
    program = _native.Program(machine.pool, machine.isa, machine.is_deterministic)
    emission = _Emission(program, tape)
    for operation in tape.operations:
        emission.add(operation)
    return program


class _KvArguments(TypedDict):
    """What every operation on a layer's cache is told about it."""

    layer: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kv_format: str


def _kv_arguments(layer: int, kv: KvShape) -> _KvArguments:
    return {
        "layer": layer,
        "num_kv_heads": kv.num_kv_heads,
        "head_dim": kv.head_dim,
        "block_size": kv.block_size,
        "kv_format": kv_format(kv),
    }


class _Emission:
    """The buffers of a tape as those of a program."""

    def __init__(self, program: _native.Program, tape: t.Tape) -> None:
        self._program = program
        self._refs: dict[int, _native.Ref] = {}
        given = [*tape.inputs, *tape.outputs]
        for number in given:
            self._refs[number] = self._make(tape.buffers[number], program.add_external)
        for number, buffer in enumerate(tape.buffers):
            if number not in self._refs:
                self._refs[number] = self._make(buffer, program.add_buffer)

    @staticmethod
    def _make(buffer: t.Buffer, add: Callable[[_native.DType, int], _native.Ref]) -> _native.Ref:
        return add(NATIVE_DTYPES[buffer.dtype], buffer.cols)

    def _ref(self, place: t.Slice) -> _native.Ref:
        ref = self._refs[place.buffer]
        is_whole = place.col == 0 and place.cols == ref.cols
        return ref if is_whole else ref.columns(place.col, place.cols)

    def _maybe(self, place: t.Slice | None) -> _native.Ref | None:
        return None if place is None else self._ref(place)

    def _place(self, place: t.Place) -> _native.Ref | _native.QuantizedRef:
        if isinstance(place, t.Slice):
            return self._ref(place)
        return _native.QuantizedRef(
            values=self._ref(place.values), scales=self._ref(place.scales), sums=self._ref(place.sums)
        )

    @singledispatchmethod
    def add(self, operation: t.Operation) -> None:
        """Append an operation to the program."""
        raise AssertionError(operation)

    @add.register
    def _(self, operation: t.Embedding) -> None:
        rows, cols = operation.table.shape
        _native.add_embedding(
            self._program,
            ids=self._ref(operation.ids),
            table=operation.table.address,
            num_rows=rows,
            row_stride=cols,
            scale=operation.scale,
            out=self._ref(operation.out),
        )

    @add.register
    def _(self, operation: t.RmsNorm) -> None:
        _native.add_rms_norm(
            self._program,
            x=self._ref(operation.x),
            weight=operation.weight.address,
            eps=operation.eps,
            weight_offset=operation.weight_offset,
            group=operation.group,
            residual=self._maybe(operation.residual),
            sum=self._maybe(operation.total),
            out=self._place(operation.out),
        )

    @add.register
    def _(self, operation: t.LayerNorm) -> None:
        _native.add_layer_norm(
            self._program,
            x=self._ref(operation.x),
            weight=operation.weight.address,
            bias=operation.bias.address,
            eps=operation.eps,
            residual=self._maybe(operation.residual),
            sum=self._maybe(operation.total),
            out=self._place(operation.out),
        )

    @add.register
    def _(self, operation: t.RopeAngles) -> None:
        _native.add_rope_angles(
            self._program,
            positions=self._ref(operation.positions),
            frequencies=operation.frequencies.address,
            num_frequencies=operation.frequencies.shape[0],
            factor=operation.factor,
            out=self._ref(operation.out),
        )

    @add.register
    def _(self, operation: t.Rope) -> None:
        _native.add_rope(
            self._program,
            x=self._ref(operation.x),
            head_dim=operation.head_dim,
            angles=self._ref(operation.angles),
            out=self._ref(operation.out),
        )

    @add.register
    def _(self, operation: t.Linear) -> None:
        matrices: list[_native.Matrix] = []
        biases: list[int] = []
        outs: list[_native.Ref] = []
        for weight, out in zip(operation.weights, operation.outs, strict=True):
            ref = self._ref(out)
            for piece in weight.pieces:
                matrices.append(piece.matrix)
                biases.append(weight.bias_address(piece.start))
                outs.append(ref.columns(piece.start, piece.matrix.out_features))
        _native.add_linear(
            self._program,
            x=self._place(operation.x),
            matrices=matrices,
            biases=biases,
            outs=outs,
            add=operation.add,
        )

    @add.register
    def _(self, operation: t.Lora) -> None:
        outs = [self._ref(out) for out in operation.outs]
        _native.add_lora(self._program, x=self._ref(operation.x), sites=list(operation.sites), outs=outs)

    @add.register
    def _(self, operation: t.GatedLinear) -> None:
        out = self._ref(operation.out)
        for gate, up in zip(operation.gate.pieces, operation.up.pieces, strict=True):
            assert gate.start == up.start, (gate.start, up.start)
            _native.add_gated_linear(
                self._program,
                x=self._place(operation.x),
                gate=gate.matrix,
                up=up.matrix,
                gate_bias=operation.gate.bias_address(gate.start),
                up_bias=operation.up.bias_address(up.start),
                activation=operation.activation,
                out=out.columns(gate.start, gate.matrix.out_features),
            )

    @add.register
    def _(self, operation: t.Moe) -> None:
        experts = operation.experts
        _native.add_moe(
            self._program,
            x=self._ref(operation.x),
            router=operation.router.address,
            num_experts=len(experts),
            experts=[(_only(each.gate), _only(each.up), _only(each.down)) for each in experts],
            top_k=operation.top_k,
            renormalize=operation.renormalize,
            activation="silu",
            quantize=experts[0].gate.takes_int8,
            out=self._ref(operation.out),
            add=operation.add,
        )

    @add.register
    def _(self, operation: t.Activate) -> None:
        _native.add_activation(
            self._program,
            x=self._ref(operation.x),
            activation=operation.activation,
            out=self._place(operation.out),
        )

    @add.register
    def _(self, operation: t.GatedActivation) -> None:
        _native.add_gated_activation(
            self._program,
            gate=self._ref(operation.gate),
            up=self._ref(operation.up),
            activation=operation.activation,
            out=self._place(operation.out),
        )

    @add.register
    def _(self, operation: t.Sum) -> None:
        first, second, out = (self._ref(each) for each in (operation.a, operation.b, operation.out))
        _native.add_sum(self._program, a=first, b=second, out=out)

    @add.register
    def _(self, operation: t.Scale) -> None:
        x, out = self._ref(operation.x), self._ref(operation.out)
        _native.add_scale(self._program, x=x, factor=operation.factor, out=out)

    @add.register
    def _(self, operation: t.Convert) -> None:
        _native.add_convert(self._program, x=self._ref(operation.x), out=self._ref(operation.out))

    @add.register
    def _(self, operation: t.Softcap) -> None:
        _native.add_softcap(self._program, x=self._ref(operation.x), cap=operation.cap)

    @add.register
    def _(self, operation: t.Quantize) -> None:
        out = self._place(operation.out)
        assert isinstance(out, _native.QuantizedRef)
        _native.add_quantize(self._program, x=self._ref(operation.x), out=out)

    @add.register
    def _(self, operation: t.WriteKv) -> None:
        _native.add_write_kv(
            self._program,
            keys=self._ref(operation.keys),
            values=self._ref(operation.values),
            **_kv_arguments(operation.layer, operation.kv),
        )

    @add.register
    def _(self, operation: t.RopeWriteKv) -> None:
        _native.add_rope_write_kv(
            self._program,
            query=self._ref(operation.query),
            keys=self._ref(operation.keys),
            values=self._ref(operation.values),
            angles=self._ref(operation.angles),
            **_kv_arguments(operation.layer, operation.kv),
        )

    @add.register
    def _(self, operation: t.Attention) -> None:
        _native.add_attention(
            self._program,
            query=self._ref(operation.query),
            num_heads=operation.num_heads,
            **_kv_arguments(operation.layer, operation.kv),
            scale=operation.scale,
            window=operation.window,
            softcap=operation.softcap,
            out=self._ref(operation.out),
        )


def _only(weight: PackedLinear) -> _native.Matrix:
    assert len(weight.pieces) == 1, "an expert is packed in one piece"
    return weight.pieces[0].matrix
