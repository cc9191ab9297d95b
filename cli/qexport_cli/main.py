"""The entry point: the list of commands, and what holds for all of them.

Only typer and the command files are imported here; numpy, torch, onnx and onnxruntime are imported inside commands,
so that `qexport --help` answers at once.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from qexport_cli.bench import bench
from qexport_cli.doctor import doctor
from qexport_cli.failures import run
from qexport_cli.generate import generate
from qexport_cli.inspect import inspect
from qexport_cli.lower import lower
from qexport_cli.models import models
from qexport_cli.quantize import quantize
from qexport_cli.scaling import scaling
from qexport_cli.score import score
from qexport_cli.serve import serve
from qexport_cli.ship import ship
from qexport_cli.signals import heard, stop_cleanly
from qexport_cli.verify import verify

DEBUG_FLAG = "--debug"

app = typer.Typer(
    name="qexport",
    help="Quantise an image generator to an ONNX bundle, prove that it computes the same, and draw with it.",
    epilog="Start here: qexport quantize --model var-c10-d4 --wbits 4",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (models, quantize, verify, generate, serve, ship, inspect, lower, bench, score, scaling, doctor):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qexport {version('qexport')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_FLAG, help="Show tracebacks and warnings; works after a command too.")
    ] = False,
) -> None:
    """Hold the options that belong to no command; `dispatch` and `_print_version` act on them."""


def dispatch(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    debug = DEBUG_FLAG in arguments
    rest = [argument for argument in arguments if argument != DEBUG_FLAG]
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")  # they are about libraries, not about anything the user can mend
        return run(app, rest or ["--help"], debug)


def main() -> None:
    """Entry point of the `qexport` command."""
    stop_cleanly()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ✓ gets ?, not a traceback
    code = dispatch(sys.argv[1:])
    heard()
    sys.exit(code)
