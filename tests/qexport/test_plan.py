import json
from dataclasses import replace

import pytest
import toy_bundle

from qexport.errors import BundleError
from qexport.plan import Call, Noise, Plan, State, Table

TABLES = {"tab": Table("float32", (1, 2), 0, 8), "drifts": Table("float32", (2, 2), 64, 16)}


@pytest.fixture
def plan():
    return toy_bundle.plan(TABLES)


def test_json_round_trip_through_sorted_text(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json(), sort_keys=True))) == plan


def test_graphs_and_iterations(plan):
    assert plan.graphs == ("step", "drift", "decode")
    assert [call.iterations for call in plan.calls] == [3, 2, 1]


def call(**changes):
    return replace(Call("g", {}, {}), **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2; this qexport plays version 1"),
        ({"output": "nothing"}, "'nothing' is not a state"),
        ({"state": (State("acc", "float8", ()),)}, "'acc' has dtype 'float8'"),
        ({"noise": (Noise("z", "cauchy", ("batch",)),)}, "cauchy"),
        ({"noise": (Noise("z", "normal", (2,)),)}, "must start with 'batch'"),
        ({"noise": ()}, "noise.z"),
        ({"calls": (call(repeat=0),)}, "no iteration"),
        ({"calls": (call(inputs={"x": "stat.acc"}),)}, "stat.acc"),
        ({"calls": (call(inputs={"x": "state.acd"}),)}, "state.acd"),
        ({"calls": (call(inputs={"x": "row.tabs"}),)}, "row.tabs"),
        ({"calls": (call(inputs={"x": "const.c"}, each=({"d": 1},)),)}, "const.c"),
        ({"calls": (call(each=({"c": 1}, {"d": 1})),)}, "different constants"),
        ({"calls": (call(each=({"c": "table:tabs"},)),)}, "table:tabs"),
        ({"calls": (call(outputs={"y": "nowhere"}),)}, "nowhere"),
    ],
)
def test_undeclared_names_are_refused(plan, change, message):
    with pytest.raises(BundleError, match=message):
        replace(plan, **change)


@pytest.mark.parametrize("broken", [{}, {"inputs": 3}, {"inputs": [], "surprise": 1}])
def test_malformed_json(broken):
    with pytest.raises(BundleError, match="malformed"):
        Plan.from_json(broken)
