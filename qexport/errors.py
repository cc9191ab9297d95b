"""One exception tree. Every message is one line: what was wrong, where, and what to do about it.

An `InputError` is something the user can mend; the command line ends with its exit code, 2. Anything that is not a
`QexportError` is a defect of qexport and shows its traceback. (A verification that fails is no error: it is a report.)
"""

from __future__ import annotations


class QexportError(Exception):
    """Base of every error that qexport raises on purpose."""

    exit_code = 2


class InputError(QexportError):
    """Wrong usage or wrong input: an unknown name, a missing file, a value out of range."""


class CheckpointError(InputError):
    """A checkpoint file that is missing, unreadable, unsafe, or of another architecture."""


class BundleError(InputError):
    """A bundle that is incomplete, altered, unsafe to open, or of another format version."""


class UnsupportedError(InputError):
    """A combination that cannot be carried out: said so rather than replaced by something else."""
