"""Where settings come from besides flags: the environment and a file, as cyclopts config layers.

The environment is read here alone. A name or key that no setting bears is an error, never ignored.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from cyclopts import App
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from penstock.cli.refused import refuse_name
from penstock.core.errors import StartupError

ENV_PREFIX: Final = "PENSTOCK_"
MAX_CONFIG_BYTES: Final = 1 << 20
SERVICE_LINK_PREFIXES: Final = ("PENSTOCK_PORT_", "PENSTOCK_SERVICE_")
"""What Kubernetes sets in every container when a Service is called `penstock`; not ours."""

Layer = dict[str, Any]  # Any: what a TOML or YAML file may hold


def _is_service_link(name: str, value: str) -> bool:
    return name.startswith(SERVICE_LINK_PREFIXES) or (name == "PENSTOCK_PORT" and "://" in value)


def read_environment(environ: Mapping[str, str]) -> Layer:
    """Settings named by `PENSTOCK_*` variables, in lower case without the prefix."""
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX) and not _is_service_link(name, value)
    }


def with_variable(error: StartupError, *, argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """The message of an error about a setting, with the variable named where the value came from one.

    Args:
        error: its `param` is the setting, if it is about one.
        argv: the flags, which come before the environment.
        environ: read for `PENSTOCK_*`.
    """
    name = error.param or ""
    variable = ENV_PREFIX + name.upper()
    flag = "--" + name.replace("_", "-")
    is_flag_given = any(word.partition("=")[0] == flag for word in argv)
    if not name or variable not in environ or is_flag_given or variable in error.message:
        return error.message
    return f"{error.message} (set by {variable})"


def read_file(path: Path) -> Layer:
    """Settings of a TOML or YAML file.

    Raises:
        StartupError: the file is missing, too large, of another kind or not a mapping.
    """
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        raise StartupError(f"config is {str(path)!r}, it must end with .toml, .yaml or .yml", param="config")
    try:
        data = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    except OSError as error:
        raise StartupError(f"config is {str(path)!r}: {error.strerror}", param="config") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise StartupError(f"config {path} is over {MAX_CONFIG_BYTES} bytes", param="config")
    values = _parse(path, data)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise StartupError(f"config {path} must be a mapping of setting names to values", param="config")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _parse(path: Path, data: bytes) -> object:
    try:
        text = data.decode()
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        line = str(error).replace("\n", " ")
        raise StartupError(f"config {path} cannot be read: {line}", param="config") from error


@dataclass(slots=True, kw_only=True)
class SettingLayers:
    """cyclopts calls this with what the flags gave; it fills in the environment, then the file."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Add values for the arguments that have none yet."""
        for name, value in read_environment(self.environ).items():  # one by one: errors name the variable
            source = f"the environment's {ENV_PREFIX}{name.upper()}"
            _apply({name: value}, source, app, commands, arguments)
        path = _config_path(arguments)
        if path is not None:
            _apply(read_file(path), str(path), app, commands, arguments)


def _apply(
    layer: Layer, source: str, app: App, commands: tuple[str, ...], arguments: ArgumentCollection
) -> None:
    for name in layer:
        refuse_name(name, source=source)
    Dict(layer, source=source, use_commands_as_keys=False)(app, commands, arguments)


def _config_path(arguments: ArgumentCollection) -> Path | None:
    for argument in arguments:
        if argument.name == "--config" and argument.tokens:
            return Path(argument.tokens[0].value)
    return None
