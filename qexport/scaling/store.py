"""The store of a sweep: one SQLite file, one row a run, with all that is needed to repeat it and what came out.

A row is written in one transaction when its run is done, so a process that is killed loses the run in flight and
nothing else. Processes share the work by *claims*: a key is claimed before it is measured, and nobody measures what
another holds. A claim names its process by host, process number and start time; when that process is gone, the claim
is *stale* and the next who wants the key takes it over. Write-ahead logging lets readers look while others write; it
needs a local disk.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.scaling.grid import Run

APPLICATION_ID = 0x51455853  # "QEXS": so that no other program's file is taken for a store
FORMAT_VERSION = 1
BUSY_S = 60.0
"""A writer waits so long for another's transaction, which takes milliseconds."""

FOREIGN_STALE_S = 24 * 3600.0
"""A claim of another host cannot be checked; after so long it is stale. The longest run here takes an hour."""

_SCHEMA = """
CREATE TABLE runs (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, series TEXT NOT NULL, number_format TEXT NOT NULL, method TEXT NOT NULL,
    settings TEXT NOT NULL, figures TEXT NOT NULL, cost TEXT NOT NULL, environment TEXT NOT NULL,
    version TEXT NOT NULL, finished_at TEXT NOT NULL, wall_s REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE per_image (
    key TEXT NOT NULL REFERENCES runs(key), name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (key, name)
) WITHOUT ROWID;
CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, claimed_at REAL NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Measured:
    """What a run gave.

    `figures` maps a name to ``{"value", "ci95", "n"}``, `cost` to sizes in bits and counts; `per_image` holds float64
    arrays (n,) that intervals are made of; `settings` is what else was decided for this run (calibration, training).
    """

    figures: Mapping[str, Mapping[str, Any]]
    cost: Mapping[str, float]
    per_image: Mapping[str, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Row:
    """A finished run as it lies in the store; `settings` holds measurement, weights' digests and the run's own."""

    key: str
    run: Run
    measured: Measured
    environment: Mapping[str, Any]
    version: str
    finished_at: str
    wall_s: float

    @property
    def settings(self) -> Mapping[str, Any]:
        """See class."""
        return self.measured.settings


class Store:
    """An open store; a process opens its own."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Open the file, and make it where it is missing and `create` says so.

        Raises:
            InputError: missing, not a store, or of another version.
        """
        self.path = Path(path)
        if not self.path.exists() and not create:
            raise InputError(f"{self.path}: no such store; `qexport scaling` makes one, or pass --store FILE")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        except sqlite3.Error as error:
            raise InputError(f"{self.path}: cannot be opened ({error})") from error
        try:
            self._require_own()  # before anything is written
            self._db.execute("PRAGMA journal_mode = WAL")
            # NORMAL: after a power cut the last rows may be missing, never half there. A killed process loses none.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._prepare()
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise InputError(f"{self.path}: not a store of qexport ({error})") from error
            raise

    def _require_own(self) -> None:
        if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
            return
        if self._pragma("application_id") != APPLICATION_ID:
            raise InputError(f"{self.path}: a database of another program; choose another --store")
        if (found := self._pragma("user_version")) != FORMAT_VERSION:
            raise InputError(f"{self.path}: a store of version {found}; this qexport reads {FORMAT_VERSION}")

    def _prepare(self) -> None:
        with self._transaction():
            if self._db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Give the file back."""
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keys(self) -> set[str]:
        """Keys of all finished runs."""
        return {key for (key,) in self._db.execute("SELECT key FROM runs")}

    def claim(self, key: str) -> bool:
        """Take a key to work on; False where it is done, or another living process holds it."""
        mine = own_name()
        with self._transaction():
            if self._db.execute("SELECT 1 FROM runs WHERE key = ?", (key,)).fetchone():
                return False
            held = self._db.execute("SELECT owner, claimed_at FROM claims WHERE key = ?", (key,)).fetchone()
            if held and held[0] != mine and is_alive(held[0], held[1]):
                return False
            self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, mine, time.time()))
        return True

    def release(self, key: str) -> None:
        """Give a key back undone, if it is this process's."""
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, own_name()))

    def claims(self) -> dict[str, str]:
        """Key → owner of what is being worked on by living processes."""
        rows = self._db.execute("SELECT key, owner, claimed_at FROM claims").fetchall()
        return {key: owner for key, owner, since in rows if is_alive(owner, since)}

    def record(
        self, key: str, run: Run, measured: Measured, *, environment: Mapping[str, Any], version: str, wall_s: float
    ) -> None:
        """Write a finished run, all or nothing, and drop its claim. A key that is there stays as it is."""
        row = (
            key, run.model, run.series, run.number_format, run.method, _json(measured.settings),
            _json(measured.figures), _json(measured.cost), _json(environment), version,
            datetime.now(UTC).isoformat(timespec="seconds"), wall_s,
        )  # fmt: skip
        with self._transaction():
            inserted = self._db.execute(f"INSERT OR IGNORE INTO runs VALUES ({','.join('?' * len(row))})", row)
            if inserted.rowcount:
                self._db.executemany(
                    "INSERT INTO per_image VALUES (?, ?, ?)",
                    [(key, name, np.asarray(v, "<f8").tobytes()) for name, v in measured.per_image.items()],
                )
            self._db.execute("DELETE FROM claims WHERE key = ?", (key,))

    def rows(self) -> list[Row]:
        """Every finished run, by model, format and method."""
        images: dict[str, dict[str, np.ndarray]] = {}
        for key, name, data in self._db.execute("SELECT key, name, data FROM per_image"):
            images.setdefault(key, {})[name] = np.frombuffer(data, "<f8")
        query = (
            "SELECT key, model, number_format, method, figures, cost, settings, environment, version, finished_at, "
            "wall_s FROM runs ORDER BY model, number_format, method, finished_at"
        )
        return [
            Row(
                key,
                Run(model, number_format, method),
                Measured(json.loads(figures), json.loads(cost), images.get(key, {}), json.loads(settings)),
                json.loads(environment),
                version,
                finished_at,
                wall_s,
            )
            for key, model, number_format, method, figures, cost, settings, environment, version, finished_at, wall_s
            in self._db.execute(query)
        ]  # fmt: skip


def own_name() -> str:
    """This process: host and boot, number, start time. Numbers are used again; the start tells whose it was."""
    return f"{_host()}|{os.getpid()}|{_started(os.getpid())}"


def is_alive(owner: str, claimed_at: float) -> bool:
    """Whether the process that `own_name` described still runs; of another host, whether it may."""
    host, _, rest = owner.partition("|")
    number, _, started = rest.partition("|")
    if host != _host():
        return time.time() - claimed_at < FOREIGN_STALE_S
    found = _started(int(number))
    return found != "" and found == started


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def _started(number: int) -> str:
    """Start of a process in ticks since boot; ``?`` where /proc does not tell but it runs, empty where it is gone."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        return "?" if _runs(number) else ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # proc(5): field 22, and the state is field 3


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=False)
