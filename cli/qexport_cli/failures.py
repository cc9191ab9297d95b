"""From exceptions to one line on stderr and an exit code.

0 done and good; 1 a check failed; 2 wrong usage or input; 130 interrupted; 70 (EX_SOFTWARE) a defect of qexport, the
only case that shows a traceback without `--debug`. A closed pipe (`qexport models | head -1`) is silent, 141 as for
other tools.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from qexport.errors import QexportError
from qexport.hidden import meant_by
from qexport_cli.signals import heard

USAGE = 2
DEFECT = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

EXPORT_PACKAGES = frozenset({"torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "matplotlib"})
"""What `qexport[export]` installs; without it, commands that need one of them say so."""


def run(app: typer.Typer, arguments: Sequence[str], debug: bool) -> int:
    """Run one command line and return its exit code.

    The command is invoked without typer's own `main`, which would print errors in a box and swallow Ctrl-C.
    """
    command = typer.main.get_command(app)
    try:
        with command.make_context("qexport", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except SystemExit as error:
        heard()
        return error.code if isinstance(error.code, int) else DEFECT
    except BrokenPipeError:
        _discard_stdout()
        return BROKEN_PIPE
    except (Exception, KeyboardInterrupt) as error:
        heard()
        message, code = explain(error)
        if debug or code == DEFECT:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # stderr may be closed or full too
            print(message, file=sys.stderr)
        return code
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """The line to print and the exit code for whatever ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, QexportError):
        return _line(str(error)), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXPORT_PACKAGES:
        needs = "this needs qexport[export]: pip install 'qexport[export]'"
        return _line(f"{needs} ({error.name} is not installed)"), USAGE
    if isinstance(error, MemoryError):
        return _line("out of memory; use a smaller batch or a machine with more memory"), USAGE
    if isinstance(error, OSError) and error.strerror:
        where = f"{meant_by(str(error.filename))}: " if error.filename else ""
        return _line(f"{where}{error.strerror.lower()}"), USAGE
    usage = getattr(error, "format_message", None)  # click's and typer's usage errors share no public base class
    if usage is not None:
        path = getattr(getattr(error, "ctx", None), "command_path", "qexport")
        return _line(f"{usage().rstrip('.')}; see `{path} --help`"), USAGE
    return _line(f"defect of qexport, please report it with the lines above: {type(error).__name__}: {error}"), DEFECT


def _line(text: str) -> str:
    return "error: " + " ".join(text.split("\n"))


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
