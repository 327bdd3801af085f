"""The `penstock` command: parses, calls, and turns every expected error into one line and an exit code."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Final

from cyclopts import App, CycloptsError, Parameter

from penstock.cli.layers import SettingLayers
from penstock.cli.refused import refuse_flags
from penstock.cli.settings import ServeSettings
from penstock.core.errors import PenstockError, StartupError

EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

app = App(
    name="penstock",
    help="Serve open-weight language models to many people at once.",
    version=lambda: version("penstock"),
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the return value is the exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        if tokens[:1] == ["serve"]:
            refuse_flags(tokens[1:])
        result = app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _fail(_one_line(error), EXIT_USAGE)
    except StartupError as error:
        return _fail(error.message, error.exit_code)
    except PenstockError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return result if isinstance(result, int) else 0


def _one_line(error: CycloptsError) -> str:
    error.verbose = False
    return " ".join(str(error).split())


def _fail(message: str, code: int) -> int:
    print(f"penstock: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
