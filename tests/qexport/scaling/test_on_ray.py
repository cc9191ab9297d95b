"""A sweep over a local Ray cluster of two workers gives the rows that a plain one gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fake_sweep
import pytest

from qexport.errors import InputError
from qexport.scaling import on_ray
from qexport.scaling.store import Store
from qexport.scaling.sweep import sweep

PROGRAM = """
import sys
sys.path.insert(0, {here!r})
import fake_sweep, ray
seen = {{"env_vars": {{"PYTHONPATH": {path!r}}}}}
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=seen)
from qexport.scaling.on_ray import sweep_on_ray
for broken in (True, False):
    outcome = sweep_on_ray(fake_sweep.task({store!r}, {log!r}, 12, broken))
    print(outcome.made, outcome.found, list(outcome.failed.values()))
ray.shutdown()
"""


def figures(path: Path) -> dict[str, tuple[object, ...]]:
    with Store(path) as store:
        return {
            row.key: (row.run, row.measured.figures, row.measured.per_image["kl"].tolist(), row.environment)
            for row in store.rows()
        }


@pytest.mark.slow
def test_two_workers_give_identical_rows(tmp_path):
    pytest.importorskip("ray")
    here = str(Path(fake_sweep.__file__).parent)
    root = str(Path(on_ray.__file__).parents[2])
    store, log = str(tmp_path / "ray.sqlite"), str(tmp_path / "log")
    text = PROGRAM.format(here=here, path=f"{here}:{root}", store=store, log=log)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["12 0 ['this one does not work']", "0 12 []"]
    sweep(fake_sweep.task(str(tmp_path / "plain.sqlite"), log, 12))
    assert figures(Path(store)) == figures(tmp_path / "plain.sqlite")
    assert len(figures(Path(store))) == 12


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'qexport\[ray\]'"):
        on_ray.sweep_on_ray(fake_sweep.task(str(tmp_path / "s.sqlite"), str(tmp_path / "log"), 2))
