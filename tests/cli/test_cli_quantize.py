"""`qexport quantize`: what it writes and says, and that it leaves nothing behind when it is stopped."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import qexport_models
from conftest import MODEL, command

from qexport.bundle import Bundle

PATIENCE_S = 120
CHECKPOINT = str(Path(next(iter(qexport_models.__path__))) / "checkpoints" / f"{MODEL}.safetensors")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "var-c10-d9"], "did you mean 'var-c10-d5'"),
        (["--model", MODEL, "--wbits", "5"], "--wbits 5 is not available"),
        (["--model", MODEL, "--abits", "5"], "--abits 5 is not available"),
        (["--model", MODEL, "--wbits", "16", "--abits", "8"], "--abits 8 needs quantised weights"),
        (["--model", MODEL, "--act-scales", "step"], "no meaning with --abits 16"),
        (["--model", MODEL, "--abits", "8", "--act-scales", "stp"], "did you mean 'step'"),
        (["--model", MODEL, "--method", "gtpq"], "did you mean 'gptq'"),
        (["--model", MODEL, "--method", "nonsense"], "smoothquant+gptq, awq+gptq, auto"),
        (["--model", MODEL, "--method", "auto"], "--target-bits or --target-bytes"),
        (["--model", MODEL, "--method", "auto", "--target-bits", "4", "--wbits", "4"], "leave --wbits out"),
        (["--model", MODEL, "--method", "auto", "--target-bits", "1"], "formats take 2.25"),
        (
            ["--model", MODEL, "--method", "auto", "--target-bits", "40"],
            "choose from 2.25 to 8.1 bits, or",
        ),
        (["--model", MODEL, "--wbits", "8", "--abits", "8", "--group-size", "32"], "leave --group-size out"),
        (
            ["--model", MODEL, "--wbits", "6", "--abits", "8", "--compare", "rtn,gptq"],
            "int6 weights in groups do not run behind int8 inputs whose scales are static",
        ),
        (["--model", MODEL, "--target-bits", "4"], "needs --method auto"),
        (["--model", MODEL, "--compare", "rtn,auto"], "does not go with auto"),
        (["--model", MODEL, "--compare", ","], "names no method"),
        (["--model", MODEL, "--compare", "rtn,gtpq"], "did you mean 'gptq'"),
        (["--model", MODEL, "--compare", "rtn", "--method", "rtn"], "leave --method out"),
        (["--model", MODEL, "--calibration-samples", "0"], "at least 1"),
        (["--model", MODEL, "--seed", "-1"], "seed -1"),
        (["--model", MODEL, "--decoder-wbits", "4"], "each must be 8 or 16"),
        (["--model", MODEL, "--decoder-abits", "8"], "needs --decoder-wbits 8"),
        (["--model", MODEL, "--group-size", "48"], "groups of 48 do not divide"),
        (["--model", MODEL, "--group-size", "1"], "--group-size 1: at least 2 weights share a scale; leave it out"),
        (["--model", MODEL, "--calibration-samples", "4"], "--calibration-samples has no meaning here: w4a16 looks at"),
        (["--model", MODEL, "--recipe", "."], "recipe .: cannot be read (is a directory); give a TOML file"),
        (["--model", "var-d16", "--checkpoint", CHECKPOINT], "this looks like var-c10-d2"),
        (["--model", "dit-xl-2-256", "--checkpoint", CHECKPOINT], "this looks like var-c10-d2"),
        (["--model", "llamagen-b-256", "--checkpoint", CHECKPOINT], "this looks like var-c10-d2"),
        (["--model", MODEL, "--out", "/proc/x"], "error: /proc/x: "),
        (["--model", MODEL, "--format", "fp4"], "--format fp4 is for study"),
        (["--model", MODEL, "--format", "fp8", "--wbits", "4"], "--wbits 4 is not available with --format fp8"),
        (["--model", MODEL, "--format", "itn"], "did you mean 'int'"),
        (["--model", MODEL, "--method", "rtm"], "did you mean 'rtn'"),
        (["--model", MODEL, "--wbits", "16", "--group-size", "32"], "--group-size 32 has no meaning"),
        (["--model", MODEL, "--wbits", "16", "--method", "rtn"], "--method rtn has no meaning"),
        (["--model", MODEL, "--recipe", "r.toml", "--wbits", "4"], "leave --wbits out"),
        (["--model", MODEL, "--recipe", "missing.toml"], "missing.toml"),
        (["--model", MODEL, "--checkpoint", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.error
    assert [name for name in leftovers(tmp_path) if name != "qexport-out"] == []


def test_a_published_model_says_which_file_to_put_where(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QEXPORT_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    outcome = run("quantize", "--model", "var-d16", "--wbits", "4", "--out", tmp_path / "out")
    assert outcome.code == 2
    for part in ("var_d16.pth", str(tmp_path / "var_d16.pth"), "--checkpoint"):
        assert part in outcome.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bundle_and_what_is_said_about_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run("quantize", "--model", MODEL, "--wbits", "8")
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("w8a16", "bits/weight", "peak memory", "qexport verify", f"qexport-out/{MODEL}-w8a16"):
        assert part in outcome.out
    Bundle.open(tmp_path / "qexport-out" / f"{MODEL}-w8a16")

    again = run("quantize", "--model", MODEL, "--wbits", "8")
    assert again.code == 2
    assert "pass --overwrite" in again.error


@pytest.mark.slow
def test_json_and_a_recipe(run, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        'version = 1\nname = "mine"\n[[rules]]\nlayers = "blocks.0.*"\nformat = "int2"\n'
        'granularity = "group"\ngroup_size = 64\n'
    )
    out = tmp_path / "out"
    outcome = run("quantize", "--model", MODEL, "--recipe", recipe, "--out", out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    figures = json.loads(outcome.out)
    assert figures["bundle"] == str(out)
    assert figures["scheme"] == "mine"
    assert figures["layers_quantized"] == 5
    assert figures["bits_per_weight_quantized"] == 2 + 16 / 64
    assert figures["size_bytes"] == sum(p.stat().st_size for p in out.iterdir() if p.name != "manifest.json")
    assert figures["digest"] == Bundle.open(out).manifest.digest


def start(out: Path, before: str = "") -> subprocess.Popen[str]:
    # A shell starts background jobs with SIGINT ignored, and that is inherited; here it must not be.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        command("quantize", "--model", MODEL, "--out", out, before=restore + before),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_half_way_it_leaves_nothing(tmp_path, number, code):
    folder = tmp_path / "folder"
    folder.mkdir()
    process = start(folder / "bundle")
    deadline = time.monotonic() + PATIENCE_S
    while not any(folder.glob(".bundle.partial-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, err
    assert out == ""
    assert err == ("interrupted\n" if number == signal.SIGINT else "")
    assert leftovers(folder) == []


@pytest.mark.slow
def test_a_full_disk(spawn, mounted):
    folder = mounted("size=1m")
    outcome = spawn("quantize", "--model", MODEL, "--out", folder / "bundle")
    assert outcome.code == 2
    assert "no space left" in outcome.error
    assert leftovers(folder) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="root has the test above")
def test_a_file_size_limit_stands_in_for_a_full_disk_without_root(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, {resource.RLIM_INFINITY}))"
    process = start(folder / "bundle", before=limit)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert "write to another disk" in err
    assert leftovers(folder) == []


def test_a_read_only_file_system(spawn, mounted):
    folder = mounted("ro,size=1m")
    outcome = spawn("quantize", "--model", MODEL, "--out", folder / "bundle")
    assert outcome.code == 2
    assert "read-only" in outcome.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(spawn, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    outcome = spawn("quantize", "--model", MODEL, "--out", folder / "bundle")
    assert outcome.code == 2
    assert "permission denied" in outcome.error
