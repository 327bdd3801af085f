"""The `penstock` command: parses, calls, and turns every expected error into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Final, Literal, get_args, get_origin

from cyclopts import App, CoercionError, CycloptsError, Parameter

from penstock.cli.layers import SettingLayers, with_variable
from penstock.cli.refused import refuse_flags
from penstock.cli.setting import SHOWN_CHARS, Range, setting
from penstock.cli.settings import ServeSettings
from penstock.core.errors import InvalidParameterError, PenstockError, StartupError
from penstock.core.params import SamplingParams

LOADING_COMMANDS: Final = (["serve"], ["chat"], ["run"])
"""Those that load a model, where people try the options that they know."""
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


def _version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:
        return "0.0.0 (run from a source tree that is not installed)"


app = App(
    name="penstock",
    help="Serve open-weight language models to many people at once.",
    version=_version,
    help_format="plaintext",
    result_action="return_value",
)


@app.command(config=SettingLayers())
def serve(
    model: Annotated[str | None, Parameter(help="Folder or hub id; without one, the embedded model.")] = None,
    *,
    settings: ServeSettings | None = None,
) -> int:
    """Serve a model over HTTP: OpenAI's API, a plain API for scripts, metrics."""
    from penstock.cli.serve import serve_forever

    return serve_forever(model, settings=settings or ServeSettings())


@app.command
def chat(
    model: Annotated[
        str | None, Parameter(help="Folder or hub id to load here; with --url, the name in its list.")
    ] = None,
    *,
    url: Annotated[str | None, Parameter(help="Talk to this server instead of loading a model.")] = None,
    api_key: Annotated[str | None, Parameter(help="Key for the server.", env_var="PENSTOCK_API_KEY")] = None,
    system: Annotated[str | None, Parameter(help="What the model is told first.")] = None,
    temperature: Annotated[
        float, setting("0 to 2; 0 always takes the likeliest.", allowed=Range(low=0, high=2))
    ] = 0.7,
    max_tokens: Annotated[
        int, setting("Most tokens of an answer.", allowed=Range(low=1, high=1 << 24))
    ] = 512,
) -> int:
    """Talk in the terminal, with a server (--url) or with a model loaded here."""
    from penstock.cli.chat import Conversation
    from penstock.cli.commands import talk

    return talk(
        model,
        url=url,
        api_key=api_key,
        conversation=Conversation(
            params=SamplingParams(temperature=temperature, max_tokens=max_tokens), system=system
        ),
    )


@app.command
def run(
    source: Annotated[Path, Parameter(help="JSONL to read: one request a line.")],
    target: Annotated[Path, Parameter(help="JSONL to append answers to; a second run goes on.")],
    *,
    model: Annotated[str | None, Parameter(help="Folder or hub id; without one, the embedded model.")] = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    kernels: Literal["auto", "native", "eager", "reference", "triton"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quantization: Literal["none", "int8", "int4", "fp8"] = "none",
    max_num_seqs: Annotated[
        int, setting("Most sequences in one step.", allowed=Range(low=1, high=4096))
    ] = 64,
) -> int:
    """Answer a file of requests without a server."""
    from penstock.cli.commands import run_batch
    from penstock.cli.local_options import LocalOptions

    options = LocalOptions(
        dtype=dtype, kernels=kernels, device=device, quantization=quantization, max_num_seqs=max_num_seqs
    )
    return run_batch(model, source=source, target=target, options=options)


@app.command
def doctor() -> int:
    """Say what this machine has and what is missing."""
    from rich.console import Console

    from penstock.cli.doctor import report

    return report(Console())


app.command("penstock.cli.bench:bench", name="bench", help="Measure a server, the engine or the kernels.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        if tokens[:1] in LOADING_COMMANDS:
            refuse_flags(tokens[1:])
        result = app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(_one_line(error), EXIT_USAGE)
    except StartupError as error:
        return _fail(with_variable(error, argv=tokens, environ=os.environ), error.exit_code)
    except InvalidParameterError as error:
        return _fail(error.message, EXIT_USAGE)
    except PenstockError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def _one_line(error: CycloptsError) -> str:
    error.verbose = False
    text = " ".join(str(error).split())
    token = error.token if isinstance(error, CoercionError) else None
    if token is None or token.keyword is None:
        return text
    assert isinstance(error, CoercionError)
    kind = _kind(error.target_type)
    if error.msg is None and kind is not None:
        text = f'Invalid value for {token.keyword}: "{token.value[:SHOWN_CHARS]}" is not {kind}.'
    if token.source in {"", "cli"}:
        return text
    return text.replace(f"for {token.keyword}:", f"for {token.keyword} provided by {token.source}:", 1)


def _kind(hint: object) -> str | None:
    """What a value of this type looks like on a command line; None where the library says it well."""
    kinds = {get_origin(hint) or hint} | {get_origin(each) or each for each in get_args(hint)}
    words = {bool: "true or false", dict: "a JSON object", int: "a whole number", float: "a number"}
    return next((word for kind, word in words.items() if kind in kinds), None)


def _fail(message: str, code: int) -> int:
    print(f"penstock: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
