"""Between runs a session's threads leave the processor to others: the option that says so does what it says."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qexport.runtime.session import make_session
from qexport.targets import QuantTraits, session_config

SPINNING = "session.intra_op.allow_spinning"
LIMIT_S = 0.004
"""Processor time of an idle process in `PAUSE_S`. A spinning thread takes 20 ms or more until it gives up; a process
that sleeps was never seen above 0.3 ms, on a busy machine."""
PAUSE_S = 0.1
PATIENCE = 50
"""Pauses until a thread that spins must have shown it, however little of the processor it gets."""


def idle_s() -> float:
    start = time.process_time()
    time.sleep(PAUSE_S)
    return time.process_time() - start


@pytest.fixture
def product(tmp_path) -> Path:
    """y = x · x, large enough for two threads."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "n"]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "product.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "product.onnx"


def spent_after_a_run(session: onnxruntime.InferenceSession, pauses: int) -> float:
    """Processor time of the process after a run, until it shows more than the limit or `pauses` are over."""
    session.run(None, {"x": np.ones((512, 512), np.float32)})
    spent = 0.0
    for _ in range(pauses):
        spent += idle_s()
        if spent > LIMIT_S:
            break
    return spent


def test_threads_sleep_between_runs(product):
    config = session_config("cpu", "serve", QuantTraits())
    spinning = replace(config, entries={**config.entries, SPINNING: "1"})
    for _ in range(PATIENCE):  # threads of other tests' sessions come to rest
        if idle_s() < LIMIT_S / 4:
            break
    ours = make_session(product, product.parent, config, 2)
    assert spent_after_a_run(ours, 1) < LIMIT_S
    theirs = make_session(product, product.parent, spinning, 2)
    assert spent_after_a_run(theirs, PATIENCE) > LIMIT_S
