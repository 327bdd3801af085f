"""One PEFT adapter folder: read once, checked against the model, turned into matrices by site.

Only `adapter_config.json` and `adapter_model.safetensors` are read, each once and into memory of its own, so
that what was checked and hashed is what is used. A field that changes what an adapter computes and that is
not known here is refused by name, never ignored. Nothing is kept of an adapter that is refused.

**Source:** the folder's form is that of Hugging Face PEFT; Hu et al., LoRA, 2021; alpha / sqrt(rank):
Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, equation 4.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from penstock.core.errors import InvalidParameterError
from penstock.kernels.adapters import LoraSite, LoraSites, LowRankPair

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_HEADER_BYTES: Final = 16 << 20
"""Beside the data: names and shapes of the tensors."""
EXPONENTS: Final = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
"""Dtypes of weights: integers of the same size, and the bits of the exponent."""
OVERFLOW: Final = 0x7F7F8000
"""The bits of the least float32 that bfloat16 rounds to infinity."""
TENSOR_NAME: Final = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
KEPT_FIELDS: Final = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "bias",
     "init_lora_weights"}
)  # fmt: skip
NEUTRAL_FIELDS: Final = frozenset(
    {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "lora_dropout",
     "fan_in_fan_out", "peft_version", "runtime_config", "loftq_config", "eva_config",
     "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core", "layers_pattern",
     "ensure_weight_tying"}
)  # fmt: skip
"""Of training, or of how weights were made: with the tensors at hand they change nothing."""
PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base model's weights alone; the others change them."""
EMPTY: Final[tuple[object, ...]] = (None, False, [], {}, "", 0)
"""Values with which an unknown field does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLimits:
    """What an adapter may be."""

    max_rank: int
    max_bytes: int
    """Of its matrices in memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A checked adapter."""

    revision: str
    """Hash of both files: part of the prefix key."""
    rank: int
    """The largest of its ranks."""
    pairs: Mapping[int, LowRankPair]
    """By the number of their site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, as far as it changes what is computed."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank at a module, by the first pattern that its name ends with."""
        return next((rank for name, rank in self.rank_pattern.items() if ends_with(module, name)), self.rank)

    def scale_of(self, module: str) -> float:
        """Factor on `B (A x)` at a module."""
        alpha = next((a for name, a in self.alpha_pattern.items() if ends_with(module, name)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """True if the adapter acts on the module."""
        return any(ends_with(module, name) for name in self.target_modules)


def ends_with(module: str, name: str) -> bool:
    """True if `name` is the module's name, or its last parts."""
    return module == name or module.endswith(f".{name}")


def wrong(param: str, message: str) -> InvalidParameterError:
    """The refusal of an adapter; `param` names the field, file or tensor at fault."""
    return InvalidParameterError(f"adapter: {message}", param=param, code="invalid_adapter")


# -- the folder --------------------------------------------------------------------------------------------


def read_file(folder: Path, name: str, *, max_bytes: int, allow_links: bool) -> bytes:
    """All of a regular file in the folder.

    Args:
        folder: where it lies.
        name: a plain file name.
        max_bytes: a larger one is refused unread.
        allow_links: follow a symbolic link (for paths from the command line: hub folders consist of them).

    Raises:
        InvalidParameterError: it is not there, not a plain file, or too large.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if allow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(folder / name, flags)
    except OSError as error:
        others = sorted(each.name for each in folder.glob("*.bin"))[:1] if folder.is_dir() else []
        hint = f"; {others[0]} is there, but only safetensors are read" if others else ""
        raise wrong(name, f"{name} cannot be read: {error.strerror}{hint}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise wrong(name, f"{name} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise wrong(name, f"{name} has {status.st_size} bytes, at most {max_bytes} are possible here")
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise wrong(name, f"{name} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise wrong(name, f"{name} has more than {max_bytes} bytes")
    return data


def read_adapter(folder: Path, *, sites: LoraSites, limits: LoraLimits, allow_links: bool = False) -> Adapter:
    """Read and check a PEFT folder.

    Args:
        folder: with both files.
        sites: the model's products.
        limits: what an adapter may be.
        allow_links: see `read_file`.

    Raises:
        InvalidParameterError: whatever is wrong with it; `param` is the field, the file or the tensor.
    """
    config_data = read_file(folder, CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES, allow_links=allow_links)
    config = read_config(config_data, max_rank=limits.max_rank)
    targets = _targets(config, sites)
    most = MAX_HEADER_BYTES + sum(
        4 * config.rank_of(site.name) * (site.in_features + site.out_features) for site in targets
    )
    data = read_file(folder, WEIGHTS_NAME, max_bytes=most, allow_links=allow_links)
    pairs = _pairs(_parse(data), config=config, targets=targets)
    num_bytes = sum(4 * (pair.a.numel() + pair.b.numel()) for pair in pairs.values())
    if num_bytes > limits.max_bytes:
        raise wrong(
            WEIGHTS_NAME, f"its matrices take {num_bytes} bytes, lora_memory_bytes is {limits.max_bytes}"
        )
    return Adapter(
        revision=_hash(config_data, data),
        rank=max(pair.rank for pair in pairs.values()),
        pairs=pairs,
    )


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


# -- its config --------------------------------------------------------------------------------------------


def read_config(data: bytes, *, max_rank: int) -> AdapterConfig:
    """Read `adapter_config.json`.

    Raises:
        InvalidParameterError: names the field.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise wrong(CONFIG_NAME, f"{CONFIG_NAME} is not JSON") from None
    if not isinstance(fields, dict):
        raise wrong(CONFIG_NAME, f"{CONFIG_NAME} must hold an object")
    if fields.get("peft_type") != "LORA":
        raise wrong("peft_type", f"peft_type is {_shown(fields.get('peft_type'))}, it must be 'LORA'")
    if fields.get("bias", "none") != "none":
        raise wrong("bias", f"bias is {_shown(fields['bias'])}, it must be 'none'")
    if fields.get("init_lora_weights") not in PLAIN_STARTS:
        shown = _shown(fields["init_lora_weights"])
        raise wrong("init_lora_weights", f"init_lora_weights is {shown}, which changes the base model")
    _refuse_unknown(fields)
    rank = _rank(fields.get("r", 8), param="r", max_rank=max_rank)
    ranks = _pattern(fields, "rank_pattern")
    alphas = _pattern(fields, "alpha_pattern")
    return AdapterConfig(
        rank=rank,
        alpha=_alpha(fields.get("lora_alpha", 8), param="lora_alpha"),
        use_rslora=_boolean(fields, "use_rslora"),
        target_modules=_target_names(fields.get("target_modules")),
        rank_pattern={
            name: _rank(value, param=f"rank_pattern.{name}", max_rank=max_rank)
            for name, value in ranks.items()
        },
        alpha_pattern={name: _alpha(v, param=f"alpha_pattern.{name}") for name, v in alphas.items()},
    )


def _shown(value: object) -> str:
    return repr(value)[:80]


def _refuse_unknown(fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        if name in KEPT_FIELDS or name in NEUTRAL_FIELDS or value in EMPTY:
            continue
        # as `repr` shows it: JSON may escape half a character, which no message can carry
        shown = _shown(name)[1:-1]
        raise wrong(shown, f"{shown} is {_shown(value)}, which is not supported: it must be empty")


def _boolean(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise wrong(name, f"{name} is {_shown(value)}, it must be true or false")
    return value


def _rank(value: object, *, param: str, max_rank: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(param, f"{param} is {_shown(value)}, it must be a whole number of at least 1")
    if value > max_rank:
        raise wrong(param, f"{param} is {_shown(value)}, max_lora_rank is {max_rank}")
    return value


def _alpha(value: object, *, param: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -1e9 <= value <= 1e9:  # type: ignore[operator]  # a number, as just checked
        raise wrong(param, f"{param} is {_shown(value)}, it must be a number from -1e9 to 1e9")
    return float(value)  # type: ignore[arg-type]  # as above


def _pattern(fields: Mapping[str, object], param: str) -> dict[str, object]:
    value = fields.get(param) or {}
    if not isinstance(value, dict):
        raise wrong(param, f"{param} is {_shown(value)}, it must be an object")
    for name in value:
        if not PLAIN_NAME.fullmatch(name):
            raise wrong(param, f"{param} has the name {_shown(name)}: regular expressions are not supported")
    return value


def _target_names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise wrong("target_modules", f"target_modules is {_shown(value)}, it must be a list of names")
    for name in value:
        if not PLAIN_NAME.fullmatch(name):
            raise wrong(
                "target_modules",
                f"target_modules has the name {_shown(name)}: regular expressions are not supported",
            )
    return tuple(value)


def _targets(config: AdapterConfig, sites: LoraSites) -> list[LoraSite]:
    """The products on which the adapter acts, each named module among them."""
    for name in config.target_modules:
        if not any(ends_with(site.name, name) for site in sites.sites):
            known = ", ".join(sorted({site.name.rsplit(".", 1)[-1] for site in sites.sites}))
            raise wrong(
                "target_modules", f"target_modules has {name!r:.80}; adapters of this model may have {known}"
            )
    return [site for site in sites.sites if config.targets(site.name)]


# -- its tensors -------------------------------------------------------------------------------------------


def _parse(data: bytes) -> dict[str, Tensor]:
    header_bytes = int.from_bytes(data[:8], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise wrong(WEIGHTS_NAME, f"{WEIGHTS_NAME}: its header has more than {MAX_HEADER_BYTES} bytes")
    try:
        return load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise wrong(WEIGHTS_NAME, f"{WEIGHTS_NAME}: {str(error)[:200]}") from None


def _pairs(
    tensors: dict[str, Tensor], *, config: AdapterConfig, targets: list[LoraSite]
) -> dict[int, LowRankPair]:
    """Both matrices of every target; takes them out of `tensors`, where nothing may be left."""
    by_module = _by_module(tensors)
    pairs = {}
    for site in targets:
        names = _names_of(site.name, by_module)
        rank = config.rank_of(site.name)
        pairs[site.index] = LowRankPair(
            a=_take(tensors, names, site, "A", shape=(rank, site.in_features)),
            b=_take(tensors, names, site, "B", shape=(site.out_features, rank)),
            scale=config.scale_of(site.name),
        )
    for name in tensors:
        raise wrong(name[:200], f"tensor {name[:200]!r} fits none of the modules that target_modules names")
    return pairs


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Names of tensors by module, then by `A` and `B`."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise wrong(name[:200], f"tensor {name[:200]!r} is not one of a LoRA adapter of linear layers")
        found.setdefault(match[1], {})[match[2]] = name
    return found


def _names_of(module: str, by_module: Mapping[str, dict[str, str]]) -> Mapping[str, str]:
    """Of one module; old GPT-2 checkpoints name it without the `transformer.` that PEFT writes."""
    return by_module.get(module) or by_module.get(f"transformer.{module}") or {}


def _check_values(tensor: Tensor, name: str) -> None:
    """Refuse what is NaN or infinite, here or as bfloat16, in which kernels keep adapters.

    Looks at the bits without the sign, in which greater numbers are greater integers, infinity has every bit
    of the exponent, and NaN more. Faster than torch's way.
    """
    bits, infinity = EXPONENTS[tensor.dtype]
    values = tensor.view(bits).numpy()
    greatest = int((values & torch.iinfo(bits).max).max(initial=0))
    if greatest >= infinity:
        raise wrong(name, f"tensor {name!r} holds NaN or infinity")
    if tensor.dtype is torch.float32 and greatest >= OVERFLOW:
        value = torch.tensor(greatest, dtype=bits).view(tensor.dtype).item()
        most = torch.finfo(torch.bfloat16).max
        raise wrong(name, f"tensor {name!r} holds +-{value:.6g}, which bfloat16 cannot: at most {most:.6g}")


def _take(
    tensors: dict[str, Tensor], names: Mapping[str, str], site: LoraSite, kind: str, *, shape: tuple[int, int]
) -> Tensor:
    name = names.get(kind)
    if name is None:
        raise wrong(site.name, f"tensor lora_{kind} of {site.name} is missing")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise wrong(name, f"tensor {name!r} has shape {list(tensor.shape)}, it must be {list(shape)}")
    if tensor.dtype not in EXPONENTS:
        raise wrong(name, f"tensor {name!r} is {tensor.dtype}, it must be float32, float16 or bfloat16")
    _check_values(tensor, name)
    return tensor
