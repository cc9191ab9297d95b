"""Whatever goes wrong: one line on stderr, and the exit code that says of which kind it is."""

from __future__ import annotations

import errno
import subprocess
import sys
import time

import pytest
from qexport_cli import failures, main

from qexport.errors import InputError

WITHOUT_EXPORT = """
import sys
BLOCKED = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors', 'ml_dtypes', 'matplotlib'}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no such thing; do that"), 2, "error: no such thing; do that"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: /x/y: no space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: /x: permission denied"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/.b.c.partial-12-3/d"),
            2,
            "error: /a/b.c/d: no such file or directory",
        ),
        (MemoryError(), 2, "error: out of memory; use a smaller batch or a machine with more memory"),
        (
            ModuleNotFoundError("No module named 'onnx'", name="onnx.helper"),
            2,
            "error: this needs qexport[export]: pip install 'qexport[export]' (onnx.helper is not installed)",
        ),
    ],
)
def test_errors_become_lines(error, code, line):
    assert failures.explain(error) == (line, code)


def test_a_message_of_several_lines_becomes_one():
    assert "\n" not in failures.explain(InputError("a\nb"))[0]


def test_a_defect_is_neither_one_nor_two_and_shows_its_traceback(run, monkeypatch):
    monkeypatch.setattr("qexport_cli.inspect._show_bundle", lambda report: {}["gone"])
    monkeypatch.setattr("qexport.inspect.inspect_bundle", lambda path: None)
    outcome = run("inspect", "/")
    assert outcome.code == failures.DEFECT
    assert "Traceback" in outcome.err
    assert "KeyError" in outcome.err.splitlines()[-1]


def test_debug_shows_the_traceback_wherever_it_stands(run, tmp_path):
    missing = tmp_path / "missing.onnx"
    assert "Traceback" not in run("inspect", missing).err
    for arguments in (("--debug", "inspect", missing), ("inspect", missing, "--debug")):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: ")


def test_interrupt(run, monkeypatch, toy):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("qexport.inspect.inspect_bundle", interrupted)
    outcome = run("inspect", toy)
    assert (outcome.code, outcome.out, outcome.error) == (130, "", "interrupted")


def test_a_second_interrupt_does_not_disturb_the_clean_up(monkeypatch):
    from qexport_cli import signals

    clock = iter([100.0, 100.5, 103.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    stopper = signals._Stopper()
    with pytest.raises(KeyboardInterrupt):
        stopper(signals.signal.SIGINT, None)
    stopper(signals.signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stopper(signals.signal.SIGINT, None)


LOST = """
import os, signal, time, weakref
import qexport.inspect

class Thing: pass

def callback(_):
    os.kill(os.getpid(), signal.{signal})
    for _ in range(1000): pass  # what the handler raises here, Python throws away

def forever(path):
    thing = Thing()
    reference = weakref.ref(thing, callback)
    del thing
    try:
        time.sleep({patience})
    finally:  # the timer must not disturb what cleans up
        for _ in range(5):
            try:
                time.sleep(0.1)
                raise OSError
            except OSError:
                pass
        print("clean")

qexport.inspect.inspect_bundle = forever
"""


@pytest.mark.skipif(sys.platform == "win32", reason="timers of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_is_lost_in_a_callback_still_ends_the_command(spawn, toy, name, code):
    start_s = time.monotonic()
    outcome = spawn("inspect", toy, before=LOST.format(signal=name, patience=100))
    assert time.monotonic() - start_s < 90
    assert (outcome.code, outcome.out) == (code, "clean\n")
    assert outcome.err == ("interrupted\n" if code == 130 else "")


def test_the_base_install_plays_and_inspects(spawn, toy, tmp_path):
    assert spawn("generate", toy, "--out", tmp_path / "a.png", before=WITHOUT_EXPORT).code == 0
    inspected = spawn("inspect", toy, before=WITHOUT_EXPORT)
    assert inspected.code == 0
    assert "install onnx" in inspected.out


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "--model", "var-c10-d2"], ["models"], ["verify", "{toy}"], ["inspect", "{toy}/step.onnx"]],
)
def test_the_base_install_says_what_is_missing(spawn, toy, arguments):
    outcome = spawn(*(argument.format(toy=toy) for argument in arguments), before=WITHOUT_EXPORT)
    assert outcome.code == 2
    assert "pip install 'qexport[export]'" in outcome.error


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX shell")
def test_a_closed_pipe_is_silent(toy):
    program = f"{sys.executable} -c 'from qexport_cli.main import main; main()'"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program} inspect {toy} | (exec <&-; sleep 3)"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (failures.BROKEN_PIPE, "")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_output_to_a_full_disk(toy):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-c", "from qexport_cli.main import main; main()", "inspect", str(toy), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: no space left on device\n")


def test_warnings_are_shown_only_with_debug(run, monkeypatch, toy):
    import warnings

    monkeypatch.setattr(main.sys, "warnoptions", [])
    monkeypatch.setattr("qexport_cli.inspect._show_bundle", lambda report: warnings.warn("noise", stacklevel=1))
    assert run("inspect", toy).err == ""
