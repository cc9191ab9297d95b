"""A sweep whose runs take some milliseconds; as a program, one that a test can kill.

python fake_sweep.py STORE LOG RUNS JOBS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from qexport.errors import InputError
from qexport.scaling.grid import Measurement, Run
from qexport.scaling.store import Measured
from qexport.scaling.sweep import Task, keyed, sweep

RUN_S = 0.03


def measure(run: Run, key: str, how: Measurement, files: Any) -> Measured:
    """Says in the log that it was called, and gives figures that follow from the key."""
    with Path(files).open("a") as log:
        log.write(key + "\n")
    time.sleep(RUN_S)
    if run.model == "broken":
        raise InputError("this one does not work")
    value = int(key[:8], 16) / 2**32
    return Measured({"kl": {"value": value, "ci95": [value, value], "n": 3}}, {}, {"kl": np.full(3, value)})


def prepare(threads: int) -> dict[str, Any]:
    return {"torch_threads": threads}


def task(store: str, log: str, count: int, broken: bool = False) -> Task:
    models = [f"m-d{i}" for i in range(count)] + ["broken"] * broken
    how = Measurement()
    runs = keyed([Run(model, "int4", "rtn") for model in models], {model: {} for model in models}, how)
    return Task(runs, how, log, store, measure, 1, prepare)


if __name__ == "__main__":
    outcome = sweep(task(sys.argv[1], sys.argv[2], int(sys.argv[3])), int(sys.argv[4]))
    print(outcome.made, outcome.found)
