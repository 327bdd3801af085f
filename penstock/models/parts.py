"""Builds layers from a checkpoint's tensors, by name.

A model's constructor takes its layers from a `Parts`, so it reads like the list of its tensors. The
loader builds every model twice: first over `meta` tensors, which checks each name, shape and dtype in
milliseconds, then over the data; so nothing is half loaded.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.kernels import ops
from penstock.kernels.adapters import LoraSite, LoraSites
from penstock.kernels.devices import CPU
from penstock.kernels.ops import KernelSet, LinearWeight
from penstock.kernels.quantization import NO_QUANTIZATION, Method, Quantization
from penstock.kernels.rounded import RoundedWeight
from penstock.layers.embedding import Embedding, LmHead, SharedEmbedding
from penstock.layers.linear import JoinedLinears, Linear, Linears, SeparateLinears
from penstock.layers.mlp import Activation, GatedMlp
from penstock.layers.norm import LayerNorm, RmsNorm
from penstock.models.config import DecoderShape
from penstock.models.stored import StoredMatrix, StoredParts, StoredTensor, TensorSource
from penstock.parallel.cut import Cut
from penstock.parallel.rank import ALONE, Rank

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Tensors that older exports carry and that follow from the config: frequencies and causal masks."""

BODY = "model"
"""What most families call the decoder without its head; embedding models are often saved so."""


@dataclass(slots=True, kw_only=True)
class Weights:
    """The tensors of one checkpoint as a model takes them. Counts what was taken."""

    checkpoint: TensorSource
    dtype: torch.dtype
    is_check: bool
    """Hand out `meta` tensors: check only."""
    is_packed: bool = False
    """The kernels copy what they read often: pages of the files are not filled ahead."""
    rounded_methods: frozenset[Method] = frozenset()
    """Of the stored matrices that the kernels take as they are."""
    on_tensor: Callable[[int], None] | None = None
    """Called after each tensor with the bytes taken so far, as the files count them."""
    device: torch.device = CPU
    """Where tensors are put, one at a time; the files' pages of what lies elsewhere are forgotten."""
    taken: set[str] = field(default_factory=set)
    num_parameters: int = 0
    """Of what was taken."""
    file_bytes: int = 0
    """Size in the files of what was taken."""
    resident_bytes: int = 0
    """Of what the model keeps in memory: tensors as they are, and weights in the form of their kernels."""
    num_rounded: dict[str, int] = field(default_factory=dict)
    """Matrices whose stored numbers and scales the kernels took as they are, by kind."""
    num_dequantized: int = 0
    """Matrices that are stored quantized and were dequantized."""

    def take(
        self, name: str, shape: tuple[int, ...], *, is_kept: bool = True, cut: Cut | None = None
    ) -> Tensor:
        """The tensor in the model's dtype; mapped, or converted if the file has another dtype.

        Args:
            name: of the tensor.
            shape: that it must have.
            is_kept: False if it is only read once, to make something else of it.
            cut: the part that is read; None for all.

        Raises:
            CheckpointError: missing or not of this shape.
        """
        stored = self._find(name, shape)
        if self.is_check:
            tensor = torch.empty(shape, dtype=self.dtype, device="meta")
        elif cut is None:
            tensor = self._placed(stored.read(self.dtype, fill=self._fills(is_kept=is_kept)))
        elif isinstance(stored, StoredParts):
            tensor = self._placed(stored.read_part(self.dtype, cut=cut))
        else:
            tensor = self._placed(cut.of(stored.read(self.dtype, fill=False)))
        self.num_dequantized += isinstance(stored, StoredMatrix)
        self.resident_bytes += tensor.nbytes if is_kept else 0
        self._count(name, shape, stored)
        return tensor

    def take_matrix(
        self, name: str, shape: tuple[int, int], *, is_kept: bool, cut: Cut | None
    ) -> "Tensor | RoundedWeight":
        """A matrix [out, in]: its numbers and scales where the kernels have that grid, else as `take`.

        Raises:
            CheckpointError: missing, not of this shape, or damaged.
        """
        if self.is_check or not self.checkpoint.is_quantized(name):
            return self.take(name, shape, is_kept=is_kept, cut=cut)
        stored = self._find(name, shape)
        if not isinstance(stored, StoredMatrix):
            return self.take(name, shape, is_kept=is_kept, cut=cut)
        whole = stored.kept(self.dtype, methods=self.rounded_methods)
        weight = whole if cut is None else _part_of(whole, cut=cut, dtype=self.dtype)
        if isinstance(weight, RoundedWeight):
            weight = replace(weight, values=self._placed(weight.values), scales=self._placed(weight.scales))
            kind = str(weight.quantization)
            self.num_rounded[kind] = self.num_rounded.get(kind, 0) + 1
        else:
            weight = self._placed(weight)
            self.num_dequantized += 1
            self.resident_bytes += weight.nbytes if is_kept else 0
        if cut is not None and isinstance(whole, RoundedWeight):
            self.checkpoint.release(whole.values)
        self._count(name, shape, stored)
        return weight

    def _fills(self, *, is_kept: bool) -> bool:
        """Whether mapped pages are read at once: they are used as they are, or copied to the device."""
        return self.device != CPU or (is_kept and not self.is_packed)

    def _placed(self, tensor: Tensor) -> Tensor:
        if self.device == CPU:
            return tensor
        moved = tensor.to(self.device)
        self.checkpoint.release(tensor)
        return moved

    def _find(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        assert name not in self.taken, name
        return self.checkpoint.find(name, shape=shape)

    def _count(self, name: str, shape: tuple[int, ...], stored: StoredTensor) -> None:
        self.taken.add(name)
        self.num_parameters += math.prod(shape)
        self.file_bytes += stored.num_bytes
        if self.on_tensor is not None:
            self.on_tensor(self.file_bytes)

    def refuse_rest(self) -> None:
        """Refuse tensors that no layer took.

        Raises:
            CheckpointError: names the first of them.
        """
        rest = [
            name
            for name in self.checkpoint
            if name not in self.taken and not name.endswith(IGNORED_SUFFIXES) and name != "lm_head.weight"
        ]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            raise CheckpointError(
                f"tensor {rest[0][:200]!r}{more} in the checkpoint fits no layer of the model"
            )


def _part_of(whole: Tensor | RoundedWeight, *, cut: Cut, dtype: torch.dtype) -> Tensor | RoundedWeight:
    """A rank's part of a matrix [out, in]; dequantized where it might end inside a group of inputs."""
    if isinstance(whole, Tensor):
        return cut.of(whole)
    is_of_outputs = cut.dim == 0
    if whole.quantization.method == "int4" and not is_of_outputs:
        return cut.of(whole.dequantized()).to(dtype)
    # As bytes: fp8 cannot be put together everywhere.
    values = cut.of(whole.values.view(torch.uint8)).view(whole.values.dtype)
    return replace(whole, values=values, scales=cut.of(whole.scales) if is_of_outputs else whole.scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadWeight:
    """What stands for a prepared weight while the checkpoint is only checked."""

    out_features: int
    in_features: int
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Layers under one name prefix."""

    weights: Weights
    kernels: KernelSet
    quantization: Quantization = NO_QUANTIZATION
    """Of the weights of linear layers, experts and the head."""
    max_model_len: int | None = None
    """Longest context that will be served; None for the model's own."""
    sites: LoraSites | None = None
    """Numbers the products on which adapters may act; None if the model is to have none."""
    num_labels: int = 0
    """Classes that the head scores; 0 if it scores the vocabulary."""
    rank: Rank = ALONE
    """Whose part of the layers is built."""
    prefix: str = ""

    def at(self, name: str) -> "Parts":
        """The same, one level down; the body of a model that was saved without its head has no level."""
        if (
            name == BODY
            and not self.prefix
            and not any(n.startswith(f"{BODY}.") for n in self.weights.checkpoint)
        ):
            return self
        return replace(self, prefix=f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        """True if the checkpoint has this tensor."""
        return self.prefix + name in self.weights.checkpoint

    def num_kv_heads(self, total: int) -> int:
        """Key/value heads of this rank; as many query heads for each as there are in all."""
        return self.rank.num(total, of="num_key_value_heads")

    def shares(self, sizes: Sequence[int]) -> list[int]:
        """This rank's part of each of some sizes that `column_linear` shares."""
        return [size // self.rank.size for size in sizes]

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor `prefix + name`."""
        return self.weights.take(self.prefix + name, shape)

    def column_matrix(self, name: str, out_features: int, in_features: int) -> LinearWeight:
        """The weight of an expert's first product, [out, in]: a rank's part of the outputs; in one piece."""
        cut = self.rank.cut((out_features,), dim=0, of=f"the outputs of {self.prefix}{name}")
        return self._prepared(name, out_features, in_features, parts=self.shares((out_features,)), cut=cut)

    def row_matrix(self, name: str, out_features: int, in_features: int) -> LinearWeight:
        """The weight of an expert's last product, [out, in]: a rank's part of the inputs."""
        cut = self.rank.cut((in_features,), dim=1, of=f"the inputs of {self.prefix}{name}")
        return self._prepared(name, out_features, in_features, parts=(out_features,), cut=cut)

    def linear(self, name: str, in_features: int, out_features: int) -> Linear:
        """A dense layer stored as [out, in], the same on every rank; without bias."""
        weight = self._prepared(f"{name}.weight", out_features, in_features)
        return Linear(kernels=self.kernels, weight=weight, site=self._site(name, in_features, out_features))

    def column_linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parts: Sequence[int] = (),
    ) -> Linear:
        """A dense layer stored as [out, in], of which each rank has some outputs.

        Args:
            name: of the layer.
            in_features: I.
            out_features: O, of all ranks.
            bias: it has one.
            parts: the sizes of those fused in it, if it is several; each is shared.
        """
        cut = self.rank.cut(parts or (out_features,), dim=0, of=f"the outputs of {self.prefix}{name}")
        offsets = self._offsets(f"{name}.bias", out_features, cut=cut) if bias else None
        weight = self._prepared(
            f"{name}.weight", out_features, in_features, bias=offsets, parts=self.shares(parts), cut=cut
        )
        site = self._site(name, in_features, out_features)
        return Linear(kernels=self.kernels, weight=weight, site=site)

    def column_linears(self, sizes: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linears:
        """As `column_linear`, several of one input: one product where the kernels have it so.

        Args:
            sizes: names, and the outputs of each.
            in_features: I.
            bias: each has one.
        """
        linears = tuple(
            self.column_linear(name, in_features, num_outputs, bias=bias)
            for name, num_outputs in sizes.items()
        )
        apart = [linear.weight for linear in linears]
        weight = ops.join_linears(self.kernels, apart)
        if weight is None:
            return SeparateLinears(linears=linears)
        self.weights.resident_bytes += weight.num_bytes - sum(each.num_bytes for each in apart)
        return JoinedLinears(
            product=Linear(kernels=self.kernels, weight=weight),
            sizes=[each.out_features for each in apart],
            sites=tuple(linear.site for linear in linears),
        )

    def stored_joined(self, name: str, in_features: int, sizes: Sequence[int]) -> Linears:
        """As `column_linears` of layers that the checkpoint has as one, without bias; adapters act on all."""
        product = self.column_linear(name, in_features, sum(sizes), parts=sizes)
        return JoinedLinears(product=product, sizes=self.shares(sizes), sites=(None,) * len(sizes))

    def query_key_value(self, shape: DecoderShape, *, bias: bool = False) -> Linears:
        """The projections of attention, stored as `q_proj`, `k_proj` and `v_proj`."""
        sizes = {"q_proj": shape.query_size, "k_proj": shape.kv_size, "v_proj": shape.kv_size}
        return self.column_linears(sizes, shape.hidden_size, bias=bias)

    def row_linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        """A dense layer stored as [out, in], of which each rank has some inputs; the first adds the bias."""
        cut = self.rank.cut((in_features,), dim=1, of=f"the inputs of {self.prefix}{name}")
        offsets = self._offsets(f"{name}.bias", out_features, is_of_first=True) if bias else None
        weight = self._prepared(f"{name}.weight", out_features, in_features, bias=offsets, cut=cut)
        return self._summed(name, weight, in_features, out_features)

    def column_transposed(
        self, name: str, in_features: int, out_features: int, *, parts: Sequence[int] = ()
    ) -> Linear:
        """As `column_linear` with bias, stored as [in, out] (GPT-2); used through a view."""
        sizes = parts or (out_features,)
        of = f"the outputs of {self.prefix}{name}"
        offsets = self._offsets(f"{name}.bias", out_features, cut=self.rank.cut(sizes, dim=0, of=of))
        weight = self._transposed(name, in_features, out_features, bias=offsets, sizes=sizes, is_column=True)
        site = self._site(name, in_features, out_features)
        return Linear(kernels=self.kernels, weight=weight, site=site)

    def row_transposed(self, name: str, in_features: int, out_features: int) -> Linear:
        """As `row_linear` with bias, stored as [in, out] (GPT-2); used through a view."""
        offsets = self._offsets(f"{name}.bias", out_features, is_of_first=True)
        weight = self._transposed(
            name, in_features, out_features, bias=offsets, sizes=(in_features,), is_column=False
        )
        return self._summed(name, weight, in_features, out_features)

    def _transposed(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: Tensor | None,
        sizes: Sequence[int],
        is_column: bool,
    ) -> LinearWeight:
        """Quantized formats keep it as [out, in] like every other layer."""
        is_quantized = self.weights.checkpoint.is_quantized(self.prefix + f"{name}.weight")
        dim = int(is_column) ^ is_quantized
        cut = self.rank.cut(
            sizes, dim=dim, of=f"the {'outputs' if is_column else 'inputs'} of {self.prefix}{name}"
        )
        if is_quantized:
            return self._prepared(f"{name}.weight", out_features, in_features, bias=bias, cut=cut)
        return self._packed(self._source(f"{name}.weight", in_features, out_features, cut=cut).t(), bias)

    def _summed(self, name: str, weight: LinearWeight, in_features: int, out_features: int) -> Linear:
        return Linear(
            kernels=self.kernels,
            weight=weight,
            site=self._site(name, in_features, out_features),
            summed_over=None if self.rank.is_alone else self.rank,
        )

    def _offsets(
        self, name: str, size: int, *, cut: Cut | None = None, is_of_first: bool = False
    ) -> Tensor | None:
        """A bias, or this rank's part of it; of one that only the first rank adds, None on the others.

        Its bytes are counted with the weight that takes it.
        """
        offsets = self.weights.take(self.prefix + name, (size,), is_kept=False, cut=cut)
        return None if is_of_first and self.rank.index else offsets

    def _site(self, name: str, in_features: int, out_features: int) -> LoraSite | None:
        if self.sites is None:
            return None
        return self.sites.add(self.prefix + name, in_features=in_features, out_features=out_features)

    def _source(self, name: str, *shape: int, cut: Cut | None = None) -> Tensor:
        return self.weights.take(self.prefix + name, shape, is_kept=not self.kernels.copies_weights, cut=cut)

    def _prepared(
        self,
        name: str,
        out_features: int,
        in_features: int,
        *,
        bias: Tensor | None = None,
        parts: Sequence[int] = (),
        cut: Cut | None = None,
    ) -> LinearWeight:
        """A stored weight in the kernels' form: its own integers, unless others are asked for."""
        if self.quantization.method != "none":
            return self._packed(self._source(name, out_features, in_features, cut=cut), bias, parts=parts)
        full_name, shape = self.prefix + name, (out_features, in_features)
        is_kept = not self.kernels.copies_weights
        weight = self.weights.take_matrix(full_name, shape, is_kept=is_kept, cut=cut)
        if isinstance(weight, Tensor):
            return self._packed(weight, bias, parts=parts)
        dtype = self.weights.dtype
        prepared = ops.prepare_rounded(self.kernels, weight, bias, dtype=dtype, parts=parts)
        self.weights.checkpoint.release(weight.values)
        return self._kept(prepared)

    def _packed(
        self, weight: Tensor, bias: Tensor | None = None, *, parts: Sequence[int] = ()
    ) -> LinearWeight:
        if self.weights.is_check:
            return UnreadWeight(out_features=weight.shape[0], in_features=weight.shape[1])
        prepared = ops.prepare_linear(
            self.kernels,
            weight,
            bias,
            quantization=self.quantization,
            parts=parts,
            release=self.weights.checkpoint.release,
        )
        if self.kernels.copies_weights:
            return self._kept(prepared)
        self.weights.resident_bytes += 0 if bias is None else bias.nbytes
        return prepared

    def _kept(self, prepared: LinearWeight) -> LinearWeight:
        self.weights.resident_bytes += prepared.num_bytes
        return prepared

    def rms_norm(self, name: str, size: int, *, eps: float, weight_offset: float = 0.0) -> RmsNorm:
        """A root mean square norm."""
        weight = self.tensor(f"{name}.weight", size)
        return RmsNorm(kernels=self.kernels, weight=weight, eps=eps, weight_offset=weight_offset)

    def layer_norm(self, name: str, size: int, *, eps: float) -> LayerNorm:
        """A norm with bias."""
        weight, bias = self.tensor(f"{name}.weight", size), self.tensor(f"{name}.bias", size)
        return LayerNorm(kernels=self.kernels, weight=weight, bias=bias, eps=eps)

    def embedding(self, name: str, num_rows: int, size: int) -> Embedding:
        """A table of vectors, the same on every rank."""
        return Embedding(kernels=self.kernels, weight=self.tensor(f"{name}.weight", num_rows, size))

    def token_embedding(self, name: str, num_rows: int, size: int) -> Embedding:
        """The vectors of the vocabulary, of which each rank has some."""
        if self.rank.is_alone:
            return self.embedding(name, num_rows, size)
        cut = Cut(dim=0, ranges=(self.rank.rows(num_rows),))
        weight = self.weights.take(f"{self.prefix}{name}.weight", (num_rows, size), cut=cut)
        return SharedEmbedding(kernels=self.kernels, weight=weight, rank=self.rank, num_rows=num_rows)

    def gated_mlp(
        self, name: str, hidden_size: int, inner_size: int, *, activation: Activation, bias: bool = False
    ) -> GatedMlp:
        """An MLP stored as `gate_proj`, `up_proj` and `down_proj`."""
        mlp = self.at(name)
        return GatedMlp(
            gate_up=mlp.column_linears(
                {"gate_proj": inner_size, "up_proj": inner_size}, hidden_size, bias=bias
            ),
            down=mlp.row_linear("down_proj", inner_size, hidden_size, bias=bias),
            activation=activation,
        )

    def lm_head(self, embedding: Embedding, *, tied: bool, softcap: float | None = None) -> LmHead:
        """The head: the embedding's weight if tied, else `lm_head.weight`; for classes `score.weight`.

        A tied weight that the kernels copy is read from the files row by row as an embedding: what is
        resident of it is the copy.
        """
        weight = embedding.weight
        if self.num_labels:
            return LmHead(kernels=self.kernels, weight=self._class_head(weight.shape[1]))
        num_rows = embedding.num_rows if isinstance(embedding, SharedEmbedding) else weight.shape[0]
        if not tied:
            cut = None if self.rank.is_alone else Cut(dim=0, ranges=(self.rank.rows(num_rows),))
            head = self._prepared("lm_head.weight", num_rows, weight.shape[1], cut=cut)
        else:
            if self.kernels.copies_weights and self.weights.checkpoint.is_mapped(weight):
                self.weights.resident_bytes -= weight.nbytes
            head = self._packed(weight)
        return LmHead(kernels=self.kernels, weight=head, softcap=softcap, rank=self.rank, vocab_size=num_rows)

    def _class_head(self, hidden_size: int) -> LinearWeight:
        """It is small, so it stays as it is whatever the quantization; softcaps are for tokens."""
        plain = replace(self, quantization=NO_QUANTIZATION, sites=None)
        return plain.linear("score", hidden_size, self.num_labels).weight
