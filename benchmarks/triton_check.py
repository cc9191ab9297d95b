"""`qexport ship --to triton` in a real Triton Inference Server, against the runtime, to the bit.

    python benchmarks/triton_check.py BUNDLE --environment ENV --out benchmarks/results/triton_check.json

ENV is a virtual environment with ``nvidia-pytriton`` (whose wheel carries a server with the Python backend, no GPU
needed) and ``onnxruntime``. That server has no ONNX Runtime backend, so for this check the models of the graphs get a
stand-in: the same configuration, with ``backend: "python"`` and a model.py that runs model.onnx. What is tested for
real are the configurations, the warm-up, and the model that plays the plan, with its calls to the others.

Images asked for alone, in one request, and at the same time from many clients must be those that the bundle draws under
the options named ``exact``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from qexport.bundle import Bundle
from qexport.runtime import load
from qexport.ship.triton import write_repository

HTTP_PORT, GRPC_PORT = 8410, 8411
START_S = 120
LABELS = (1, 8, 3, 0, 2)

STAND_IN = """
import json, pathlib
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self.outputs = [output["name"] for output in json.loads(args["model_config"])["output"]]

    def execute(self, requests):
        responses = []
        for request in requests:
            names = [port.name for port in self.session.get_inputs()]
            feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
            values = self.session.run(self.outputs, feeds)
            tensors = [pb_utils.Tensor(name, value) for name, value in zip(self.outputs, values)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""

CLIENT = """
import sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, tritonclient.grpc as triton

url, model, out, labels = sys.argv[1], sys.argv[2], sys.argv[3], [int(label) for label in sys.argv[4].split(",")]

def ask(rows):
    client = triton.InferenceServerClient(url)
    inputs = []
    for name, column, kind in (("label", 0, np.int64), ("seed", 1, np.uint64), ("index", 2, np.uint64)):
        array = np.array([[row[column]] for row in rows], kind)
        inputs.append(triton.InferInput(name, list(array.shape), kind.__name__.upper()))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs).as_numpy("image")

rows = [(label, 7, i) for i, label in enumerate(labels)]
together = ask(rows)
alone = np.concatenate([ask([row]) for row in rows])
with ThreadPoolExecutor(len(rows)) as pool:
    many = np.concatenate(list(pool.map(lambda row: ask([row]), rows)))
try:
    ask([(10**6, 0, 0)])
    refused = ""
except triton.InferenceServerException as error:
    refused = error.message()
np.savez(out, together=together, alone=alone, many=many, refused=refused)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--schedule")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    (packages,) = options.environment.resolve().glob("lib/python*/site-packages")
    version = packages.parent.name.removeprefix("python")
    carried = packages / "pytriton" / "tritonserver"
    with tempfile.TemporaryDirectory(prefix="qexport-triton-") as name:
        folder = Path(name)
        made = write_repository(bundle, folder / "repository", name="it", schedule=options.schedule)
        for graph in made.models[1:]:
            model = made.path / graph
            (model / "1" / "model.py").write_text(STAND_IN)
            config = (model / "config.pbtxt").read_text().replace('backend: "onnxruntime"', 'backend: "python"')
            (model / "config.pbtxt").write_text(config.replace('"model.onnx"', '"model.py"'))
        backend = folder / "backends" / "python"
        shutil.copytree(carried / "backends" / "python", backend)
        stub = backend / "triton_python_backend_stub"
        shutil.copy(carried / "python_backend_stubs" / version / stub.name, stub)
        server = carried / "bin" / "tritonserver"
        for program in (server, stub):
            program.chmod(0o755)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            "PATH": f"{options.environment.resolve() / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(packages),
        }
        arguments = [f"--model-repository={made.path}", f"--backend-directory={backend.parent}"]
        arguments += [f"--http-port={HTTP_PORT}", f"--grpc-port={GRPC_PORT}", "--allow-metrics=false"]
        arguments += ["--http-address=127.0.0.1", "--grpc-address=127.0.0.1"]
        log = folder / "log"
        with log.open("w") as file:
            process = subprocess.Popen([server, *arguments], env=environment, stdout=file, stderr=file)
        try:
            end_s = time.monotonic() + START_S
            while "Started HTTPService" not in log.read_text():
                if process.poll() is not None or time.monotonic() > end_s:
                    raise SystemExit(log.read_text()[-3000:])
                time.sleep(0.5)
            answers = folder / "answers.npz"
            python = options.environment / "bin" / "python"
            what = [f"127.0.0.1:{GRPC_PORT}", "it", answers, ",".join(map(str, LABELS))]
            subprocess.run([python, "-c", CLIENT, *what], check=True)
        finally:
            process.terminate()
            process.wait(60)
        drawn = np.load(answers)
        runtime = load(options.bundle, provider="cpu", options="exact", threads=1)
        want = runtime.generate(list(LABELS), seed=7, schedule=options.schedule)
        result = {
            "bundle": bundle.manifest.digest,
            "scheme": bundle.manifest.scheme,
            "backends_in_the_package": sorted(path.name for path in (carried / "backends").iterdir()),
            "server": next(
                line.split("|")[2].strip() for line in log.read_text().splitlines() if "server_version" in line
            ),
            "model": bundle.manifest.model.name,
            "max_difference": {how: float(np.abs(drawn[how] - want).max()) for how in ("together", "alone", "many")},
            "refused": str(drawn["refused"]),
        }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any(result["max_difference"].values()) or not result["refused"])


if __name__ == "__main__":
    main()
