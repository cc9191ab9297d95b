"""A bundle small enough to work out by hand, with every kind of source: three graphs, a state that grows, two noises.

z                           acc starts as normal noise (batch, 2), hist as (batch, 0, 2)
step, n = 1, 2, 3           acc ← acc/2 + gain · Σ u + add + tab + label, u uniform (batch, n, 2); hist ← hist ‖ acc
drift, twice                acc ← acc + drifts[i]
decode                      image ← clip((acc + mean hist) · W, 0, 1), W (2, 12) in weights.data, as (batch, 3, 2, 2)
"""

import json
from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper
from philox import Philox

from qexport.bundle import BundleWriter, Manifest, ModelInfo
from qexport.bundle.manifest import digest_of
from qexport.plan import Call, Input, Noise, Plan, State

ADD = (0.25, -0.5, 1.0)
TAB = np.array([[0.125, -0.25]], np.float32)
DRIFTS = np.array([[0.5, 1.0], [-0.25, 0.125]], np.float32)
W = np.linspace(-0.2, 0.3, 24, dtype=np.float32).reshape(2, 12)
CLASSES = 4


def plan(tables):
    return Plan(
        inputs=(
            Input("label", "int64", ("batch",), minimum=0, maximum=CLASSES - 1, doc="class"),
            Input("gain", "float32", (), default=1.0, minimum=0),
            Input("shift", "float32", ("batch",), default=0),
        ),
        state=(
            State("acc", "float32", ("batch", 2), "noise.z"),
            State("hist", "float32", ("batch", "past", 2)),
            State("image", "float32", ("batch", 3, 2, 2)),
        ),
        noise=(Noise("z", "normal", ("batch", 2)), Noise("u", "uniform", ("batch", "n", 2))),
        calls=(
            Call(
                "step",
                # u before acc on purpose: the order of ports must not matter
                {
                    "u": "noise.u",
                    "label": "input.label",
                    "gain": "input.gain",
                    "acc": "state.acc",
                    "hist": "state.hist",
                    "add": "const.add",
                    "tab": "const.tab",
                },
                {"acc_next": "acc", "hist_next": "hist"},
                each=tuple({"n": i + 1, "add": add, "tab": "table:tab"} for i, add in enumerate(ADD)),
            ),
            Call("drift", {"acc": "state.acc", "by": "row.drifts"}, {"acc_next": "acc"}, repeat=len(DRIFTS)),
            Call("decode", {"acc": "state.acc", "hist": "state.hist", "shift": "input.shift"}, {"image": "image"}),
        ),
        output="image",
        dims={"past": 0},
        tables=tables,
    )


def expected(labels, seed=0, first_index=0, gain=1.0, shift=0.0):
    """What the bundle computes, in float64 and one image at a time."""
    images = []
    for i, label in enumerate(labels):
        stream = Philox(seed, first_index + i)
        acc = np.array([stream.normal(), stream.normal()])
        hist = []
        for n, add in enumerate(ADD, start=1):
            u = np.array([stream.uniform() for _ in range(2 * n)]).reshape(n, 2)
            acc = acc / 2 + gain * u.sum(0) + add + TAB[0] + label
            hist.append(acc)
        acc = acc + DRIFTS.astype(np.float64).sum(0)
        images.append(np.clip((acc + np.mean(hist, 0)) @ W + shift, 0, 1).reshape(3, 2, 2))
    return np.array(images)


def _model(name, nodes, inputs, outputs, constants=(), external=()):
    def info(port, dtype, shape):
        return helper.make_tensor_value_info(port, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    initialisers = [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape, v) for n, v in constants]
    for ref, location in external:
        tensor = TensorProto(name=ref.name, data_type=TensorProto.FLOAT, dims=ref.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": ref.offset, "length": ref.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        initialisers.append(tensor)
    graph = helper.make_graph(nodes, name, [info(*i) for i in inputs], [info(*o) for o in outputs], initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString(deterministic=True)


def graphs(w_ref, location="weights.data"):
    """The three .onnx files, as bytes."""
    node = helper.make_node
    axes = [("one", np.array([1], np.int64))]
    step = _model(
        "step",
        [
            node("ReduceSum", ["u", "one"], ["u_sum"], keepdims=0),
            node("Mul", ["u_sum", "gain"], ["drawn"]),
            node("Mul", ["acc", "half"], ["halved"]),
            node("Add", ["halved", "drawn"], ["a"]),
            node("Add", ["a", "add"], ["b"]),
            node("Add", ["b", "tab"], ["c"]),
            node("Cast", ["label"], ["label_f"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["label_f", "one"], ["label_2"]),
            node("Add", ["c", "label_2"], ["acc_next"]),
            node("Unsqueeze", ["acc_next", "one"], ["acc_3"]),
            node("Concat", ["hist", "acc_3"], ["hist_next"], axis=1),
        ],
        [
            ("label", "int64", ["batch"]),
            ("gain", "float32", []),
            ("acc", "float32", ["batch", 2]),
            ("hist", "float32", ["batch", "past", 2]),
            ("u", "float32", ["batch", "k", 2]),
            ("add", "float32", [1]),
            ("tab", "float32", [1, 2]),
        ],
        [
            ("acc_next", "float32", ["batch", 2]),
            ("hist_next", "float32", ["batch", "past_next", 2]),
            ("u_sum", "float32", ["batch", 2]),
        ],
        [*axes, ("half", np.array(0.5, np.float32))],
    )
    drift = _model(
        "drift",
        [node("Add", ["acc", "by"], ["acc_next"])],
        [("acc", "float32", ["batch", 2]), ("by", "float32", [2])],
        [("acc_next", "float32", ["batch", 2])],
    )
    decode = _model(
        "decode",
        [
            node("ReduceMean", ["hist", "one"], ["mean"], keepdims=0),
            node("Add", ["acc", "mean"], ["a"]),
            node("Unsqueeze", ["a", "two"], ["a_3"]),
            node("Mul", ["a_3", "W"], ["aw"]),  # not MatMul, whose kernels may depend on the batch
            node("ReduceSum", ["aw", "one"], ["flat"], keepdims=0),
            node("Unsqueeze", ["shift", "one"], ["shift_2"]),
            node("Add", ["flat", "shift_2"], ["shifted"]),
            node("Clip", ["shifted", "lo", "hi"], ["clipped"]),
            node("Reshape", ["clipped", "shape"], ["image"]),
        ],
        [("acc", "float32", ["batch", 2]), ("hist", "float32", ["batch", "past", 2]), ("shift", "float32", ["batch"])],
        [("image", "float32", ["batch", 3, 2, 2])],
        [
            *axes,
            ("two", np.array([2], np.int64)),
            ("lo", np.array(0, np.float32)),
            ("hi", np.array(1, np.float32)),
            ("shape", np.array([-1, 3, 2, 2], np.int64)),
        ],
        [(w_ref, location)],
    )
    return {"step": step, "drift": drift, "decode": decode}


def manifest(the_plan, **changes):
    base = Manifest(
        model=ModelInfo("toy", "toys", image_size=2, num_classes=CLASSES, licence="MIT", source="made by hand"),
        scheme="w32a32",
        recipe="none",
        dtype="float32",
        checkpoints={"generator": "0" * 64},
        plan=the_plan,
        graphs={name: f"{name}.onnx" for name in the_plan.graphs},
        layers=({"name": "W", "graph": "decode", "shape": (2, 12), "sqnr_db": np.float32(12.5)},),
        totals={"bits_per_weight": 32.0},
    )
    return replace(base, **changes)


def write(out, overwrite=False, target=False, location="weights.data"):
    """Write the toy bundle to the folder `out`; with `target` also a decode graph in targets/toy/."""
    with BundleWriter(out, overwrite=overwrite) as writer:
        w_ref = writer.weights.add("W", W, "float32", W.shape)
        tables = {
            "tab": writer.weights.add("tab", TAB, "float32", TAB.shape).table(),
            "drifts": writer.weights.add("drifts", DRIFTS, "float32", DRIFTS.shape).table(),
        }
        for name, data in graphs(w_ref, location).items():
            writer.write(f"{name}.onnx", data)
        writer.write("recipe.toml", b"# nothing\n")
        targets = {}
        if target:
            writer.write("targets/toy/decode.onnx", graphs(w_ref)["decode"])
            targets = {"toy": {"decode": "targets/toy/decode.onnx"}}
        return writer.finish(manifest(plan(tables), targets=targets))


def resign(folder, change):
    """Edit the manifest with `change(data)` and give it a fitting digest, as someone malicious would."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["digest"]
    change(data)
    path.write_text(json.dumps({**data, "digest": digest_of(data)}))
