"""What the extension module offers. Addresses are `tensor.data_ptr()`; the caller keeps their owners alive.

Rooms: programs (csrc/src/program.cpp), linear, attention, dense, sampling, probes. Each `add_*` appends one
operation to a program; nothing is computed until `Program.run`.
"""

from enum import Enum

class DType(Enum):
    bf16 = 0
    f32 = 1
    i8 = 2
    i32 = 3
    i64 = 4

class Pool:
    def __init__(self, threads: int, cpus: list[int], linger_us: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

class Ref:
    """Some columns of a buffer of a program."""

    @property
    def buffer(self) -> int: ...
    @property
    def col(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def dtype(self) -> DType: ...
    def columns(self, start: int, cols: int) -> Ref: ...

class QuantizedRef:
    """int8 rows with a scale each and sums of every 32 values: i8 [rows, K], f32 [rows, 1], i32 [rows, ceil(K / 64) * 2]."""

    def __init__(self, values: Ref, scales: Ref, sums: Ref) -> None: ...

class AttentionInputs:
    def __init__(
        self,
        num_seqs: int,
        query_start_loc: int,
        seq_lens: int,
        block_tables: int,
        max_num_blocks: int,
        slot_mapping: int,
    ) -> None: ...

class LayerKv:
    def __init__(self, keys: int, values: int, block_bytes: int, group: int) -> None: ...

class Program:
    def __init__(self, pool: Pool, isa: str, deterministic: bool) -> None: ...
    def add_buffer(self, dtype: DType, cols: int) -> Ref: ...
    def add_external(self, dtype: DType, cols: int) -> Ref: ...
    def set_layers(self, layers: list[LayerKv]) -> None: ...
    def set_next(self, next: Program) -> None:
        """Say which complete program runs after this one: idle threads ask for its weights meanwhile."""
    def set_reads_ahead(self, reads_ahead: bool) -> None:
        """False: waiting threads ask for nothing; for measuring what it gives."""
    def run(
        self,
        num_rows: int,
        externals: list[tuple[int, int]],
        groups: list[AttentionInputs],
        adapters: list[tuple[int, int, Adapter]] = ...,
    ) -> None:
        """externals: (address, bytes from row to row) in the order of `add_external`. adapters: (first row, rows,
        whose), rising and apart; rows in none are the base model's.
        """
    def profile(
        self,
        num_rows: int,
        externals: list[tuple[int, int]],
        groups: list[AttentionInputs],
        rounds: int,
        adapters: list[tuple[int, int, Adapter]] = ...,
    ) -> list[float]:
        """Seconds of each operation, mean of `rounds`."""
    def shrink(self) -> None: ...
    @property
    def op_names(self) -> list[str]: ...
    @property
    def buffer_bytes(self) -> int: ...

def supported_isas() -> list[str]: ...

# ---- linear

class Matrix:
    """A packed weight."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def format(self) -> str:
        """bf16, int8 or int4"""
    @property
    def group_size(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def unpack(self, out: int) -> None:
        """Write what it stands for to float32 [out_features, in_features]."""

def pack(
    pool: Pool,
    *,
    data: int,
    dtype: DType,
    row_stride: int,
    col_stride: int,
    out_features: int,
    in_features: int,
    format: str,
    group_size: int,
) -> Matrix: ...
def pack_rounded(
    pool: Pool, *, values: int, scales: int, out_features: int, in_features: int, format: str, group_size: int
) -> Matrix:
    """values: int8 [out_features, in_features]; scales: float32 [out_features] (int8), or float16
    [out_features, ceil(in_features / group_size)] (int4). Kept as they are.
    """

def add_linear(
    program: Program,
    *,
    x: Ref | QuantizedRef,
    matrices: list[Matrix],
    biases: list[int],
    outs: list[Ref],
    add: bool,
) -> None:
    """One product per matrix, all of the same x. biases: addresses of float32 [out_features], 0 for none.
    outs: bf16 or f32. add: add to what stands in `outs` (a residual) instead of storing.
    """

def add_gated_linear(
    program: Program,
    *,
    x: Ref | QuantizedRef,
    gate: Matrix,
    up: Matrix,
    gate_bias: int,
    up_bias: int,
    activation: str,
    out: Ref,
) -> None:
    """Out = activation(gate(x)) * up(x); activation: silu, gelu or gelu_tanh; out bf16."""

# ---- adapters

class Adapter:
    """An adapter's matrices by site, as `lora.h` draws them; their memory is the caller's to keep."""

    def __init__(self, num_sites: int) -> None: ...
    def set_site(self, site: int, *, a: int, b: int, rank: int, scale: float) -> None:
        """a: address of bf16 [rank, in]; b: of bf16 [ceil(out / 32), rank, 32]."""

def add_lora(program: Program, *, x: Ref, sites: list[int], outs: list[Ref]) -> None:
    """outs[i] += what each row's adapter brings at sites[i], products of the same x (bf16). outs: bf16 or f32."""

# ---- dense; weights are addresses of bf16 values; x may be bf16 or f32; out may be bf16 or f32, or quantized

def add_embedding(
    program: Program, *, ids: Ref, table: int, num_rows: int, row_stride: int, scale: float, out: Ref
) -> None:
    """ids: i64 [rows, 1]. An id outside the table gives NaN."""

def add_rms_norm(
    program: Program,
    *,
    x: Ref,
    weight: int,
    eps: float,
    weight_offset: float,
    group: int,
    residual: Ref | None,
    sum: Ref | None,
    out: Ref | QuantizedRef,
) -> None:
    """group: values that are normed together (cols for a whole row, head_dim for each head; weight has `group` values).
    residual: added to x first; sum: where x + residual goes (may be `residual` itself).
    """

def add_layer_norm(
    program: Program,
    *,
    x: Ref,
    weight: int,
    bias: int,
    eps: float,
    residual: Ref | None,
    sum: Ref | None,
    out: Ref | QuantizedRef,
) -> None: ...
def add_quantize(program: Program, *, x: Ref, out: QuantizedRef) -> None:
    """Scale = max|x| / 127 of the row (a row of zeros has scale 0), round to nearest even."""

def add_convert(program: Program, *, x: Ref, out: Ref) -> None:
    """Copy, changing the dtype."""

def add_sum(program: Program, *, a: Ref, b: Ref, out: Ref) -> None: ...
def add_scale(program: Program, *, x: Ref, factor: float, out: Ref) -> None: ...
def add_activation(program: Program, *, x: Ref, activation: str, out: Ref | QuantizedRef) -> None: ...
def add_gated_activation(
    program: Program, *, gate: Ref, up: Ref, activation: str, out: Ref | QuantizedRef
) -> None: ...
def add_softcap(program: Program, *, x: Ref, cap: float) -> None:
    """In place: cap * tanh(x / cap)."""

def add_moe(
    program: Program,
    *,
    x: Ref,
    router: int,
    num_experts: int,
    experts: list[tuple[Matrix, Matrix, Matrix]],
    top_k: int,
    renormalize: bool,
    activation: str,
    quantize: bool,
    out: Ref,
    add: bool,
) -> None:
    """X bf16; router: bf16 [num_experts, hidden]; experts: gate, up, down; quantize: int8 activations inside."""

# ---- attention

def kv_block_bytes(*, kv_format: str, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of the keys (as many again for the values) of one block of one layer; kv_format: bf16 or int8."""

def add_rope_angles(
    program: Program, *, positions: Ref, frequencies: int, num_frequencies: int, factor: float, out: Ref
) -> None:
    """positions: i64 [rows, 1]; frequencies: float32; out: f32 [rows, 2 * num], cosines then sines."""

def add_rope(program: Program, *, x: Ref, head_dim: int, angles: Ref, out: Ref) -> None: ...
def add_write_kv(
    program: Program,
    *,
    keys: Ref,
    values: Ref,
    layer: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    kv_format: str,
) -> None: ...
def add_rope_write_kv(
    program: Program,
    *,
    query: Ref,
    keys: Ref,
    values: Ref,
    angles: Ref,
    layer: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    kv_format: str,
) -> None:
    """Rotate the query in place, rotate the keys and write them, write the values."""

def add_attention(
    program: Program,
    *,
    query: Ref,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    kv_format: str,
    scale: float,
    window: int,
    softcap: float,
    out: Ref,
) -> None:
    """window: 0 for none; softcap: 0.0 for none; query and out bf16 [rows, num_heads * head_dim]."""

# ---- sampling

class RowEdits:
    """What changes one row's logits before the choice: addresses of arrays and their lengths, in the order of use.

    mask: int32 [ceil(vocab / 32)], 0 for none; banned, biased, prompt, answer: int64 ids; biases, counts: float32.
    """

    def __init__(
        self,
        *,
        mask: int,
        banned: int,
        num_banned: int,
        biased: int,
        biases: int,
        num_biased: int,
        prompt: int,
        num_prompt: int,
        answer: int,
        counts: int,
        num_answer: int,
        repetition: float,
        presence: float,
        frequency: float,
    ) -> None: ...

class TokenSampler:
    def __init__(self, pool: Pool, isa: str) -> None: ...
    def sample(
        self,
        *,
        logits: int,
        row_stride: int,
        vocab: int,
        num_rows: int,
        rows: int,
        temperatures: int,
        top_k: int,
        top_p: int,
        min_p: int,
        uniforms: int,
        edits: list[tuple[int, RowEdits]],
        num_top: int,
        max_top: int,
        tokens: int,
        statuses: int,
        logprobs: int,
        ranks: int,
        top_ids: int,
        top_logprobs: int,
    ) -> None:
        """Draw `num_rows` tokens; see csrc/include/penstock/sampling.h for the arrays.

        Read: logits float32 [.., vocab], `row_stride` floats from row to row; rows int64; temperatures (0 is greedy),
        top_k, top_p, min_p, uniforms float64; edits (row of the call, its edits); num_top int64, -1 for no logprobs,
        or the address 0. Written: tokens, ranks int64; statuses int32 (0 drawn, 1 not finite, 2 none allowed);
        logprobs float64; top_ids int64 and top_logprobs float64 [num_rows, max_top]. An id outside the vocabulary
        raises IndexError before anything is drawn.
        """
    @property
    def num_bytes(self) -> int: ...

def rows_are_finite(
    pool: Pool, *, isa: str, data: int, dtype: DType, num_rows: int, cols: int, row_bytes: int, out: int
) -> None:
    """out: uint8 [num_rows], 0 where a value of the row is NaN or infinite, else 1; dtype: bf16 or f32."""

# ---- a step of decodes

class PreparedDraws:
    """Draws whose numbers are there before their logits; arrays as `TokenSampler.sample` takes them."""

    def __init__(
        self,
        sampler: TokenSampler,
        *,
        vocab: int,
        num_rows: int,
        starts: int,
        rows: int,
        temperatures: int,
        top_k: int,
        top_p: int,
        min_p: int,
        uniforms: int,
        num_top: int,
        max_top: int,
        tokens: int,
        statuses: int,
        logprobs: int,
        ranks: int,
        top_ids: int,
        top_logprobs: int,
    ) -> None:
        """starts: uint64 [num_rows] of the streams of random numbers, or the address 0 where all are greedy."""
    def number(self, output_idxs: list[int]) -> None:
        """Write the random numbers of these tokens of the answers; nothing where all are greedy."""
    def tokens(self) -> list[int] | None:
        """What was drawn; None unless every row gave a token."""

class DecodePass:
    """Layers, head, soundness and draws in one call, over memory that outlives it; see decode_pass.h."""

    def __init__(
        self,
        *,
        num_rows: int,
        token_ids: tuple[int, int],
        positions: tuple[int, int],
        hidden: tuple[int, int],
        hidden_dtype: DType,
        hidden_cols: int,
        logits: tuple[int, int],
        logits_cols: int,
        groups: list[AttentionInputs],
    ) -> None:
        """Pairs are (address, bytes from row to row)."""
    def run(
        self,
        layers: Program,
        head: Program,
        adapters: list[tuple[int, int, Adapter]],
        draws: PreparedDraws | None,
    ) -> list[int]:
        """The rows whose hidden values are NaN or infinite, rising."""
    @property
    def program_seconds(self) -> float:
        """Of the last run, inside the two programs."""

# ---- probes

def read_bandwidth(pool: Pool, *, num_bytes: int, passes: int) -> float:
    """Best bytes a second over the passes, all threads reading a buffer in huge pages."""

def multiply_peak(pool: Pool, *, isa: str, dtype: str, seconds: float) -> float:
    """Operations a second (two for each multiply-add) from registers alone; dtype: bf16, int8 or f32."""
