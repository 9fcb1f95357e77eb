"""The `megatron-growth` command: `plan` growth, `grow` to disk, `inspect` and `verify` checkpoints,
run the `demo`.

A skin over the library: each command is a few lines. `plan`, `inspect` and `verify` only read;
`grow` writes a checkpoint; growing while Megatron loads is `python -m megatron_growth.pretrain`.
Exit codes: 0 done, 1 not verified or not going to run, 2 for the user to put right; of a stage that
failed under `launch`, its own.
"""

import os
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from megatron_growth.cli.experiments import launch, schema, status
from megatron_growth.cli.grow import grow
from megatron_growth.cli.inspect import inspect
from megatron_growth.cli.plan import plan
from megatron_growth.cli.verify import verify
from megatron_growth.errors import GrowthError

_SECONDS_FOR_RANK_0 = 2
_UsageError: Any = typer.BadParameter.__base__  # of whichever click typer brings along

app = typer.Typer(
    help="Grow a Mixture-of-Experts checkpoint while Megatron loads it, and train on.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

for command in (plan, grow, inspect, verify, launch, status, schema):
    app.command()(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, and exit. Of a torchrun's ranks, which fail together, the first speaks,
    and the launcher must not end it before."""
    words = None if argv is None else list(argv)
    try:
        sys.exit(app(words, prog_name="megatron-growth", standalone_mode=False) or 0)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        message = error.format_message().replace("Value error, ", "")
        _fail(f"{message} (--help says more)")
    except GrowthError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename!r}: {error.strerror}; see that it is there and may be used")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _fail(message: str, code: int = 2) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        line = " ".join(message.splitlines())
        print(f"megatron-growth: error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_FOR_RANK_0)
    sys.exit(code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps, to see that it runs.")
    ] = False,
) -> None:
    """Train a tiny base, grow it, and train on, without a GPU."""
    from megatron_growth.demo import run  # brings Megatron in

    run(out, quick)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"megatron-growth {version('megatron-growth')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before the command."""
