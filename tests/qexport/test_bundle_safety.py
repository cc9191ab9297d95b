import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy_bundle

from qexport.bundle import Bundle, BundleWriter, writer
from qexport.errors import BundleError, InputError
from qexport.plan import Table


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "toy"
    toy_bundle.write(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "toy"))


def refused(folder, message, kind=BundleError, check="full"):
    with pytest.raises(kind, match=message) as caught:
        Bundle.open(folder, check)
    assert "\n" not in str(caught.value)


def test_truncated(folder):
    os.truncate(folder / "weights.data", 100)
    refused(folder, r"weights\.data: truncated: 100 bytes of \d+; copy the bundle again or quantise", check="size")


def test_longer(folder):
    with (folder / "step.onnx").open("ab") as file:
        file.write(b"x")
    refused(folder, r"step\.onnx: too long", check="size")


def test_one_bit_flipped(folder):
    data = bytearray((folder / "weights.data").read_bytes())
    data[0] ^= 1
    (folder / "weights.data").write_bytes(data)
    refused(folder, r"weights\.data: altered")
    Bundle.open(folder, check="size")  # by design: sizes alone cannot tell


def test_missing(folder):
    (folder / "recipe.toml").unlink()
    refused(folder, r"recipe\.toml: missing")


@pytest.mark.parametrize("extra", ["notes.txt", "sub/step.onnx", ".hidden", "reports.txt"])
def test_unlisted_file(folder, extra):
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).touch()
    refused(folder, "not part of the bundle; move it away", check="size")


def test_reports_may_hold_anything(folder):
    (folder / "reports/deep").mkdir(parents=True)
    (folder / "reports/deep/verify.json").write_text("{}")
    assert Bundle.open(folder).reports == folder / "reports"


def test_edited_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"toys"', '"boys"'))
    refused(folder, r"manifest\.json: was edited or damaged")


@pytest.mark.parametrize("escape", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:x", "./a", "a//b", "", "a\nb"])
def test_escaping_path(folder, escape):
    toy_bundle.resign(folder, lambda data: data["files"].update({escape: {"sha256": "0", "size": 1}}))
    refused(folder, "may leave the bundle")


def test_listed_report_or_manifest(folder):
    toy_bundle.resign(folder, lambda data: data["files"].update({"reports/x": {"sha256": "0", "size": 1}}))
    refused(folder, "cannot be hashed")


def test_graph_in_unlisted_file(folder):
    toy_bundle.resign(folder, lambda data: data["graphs"].update(step="../step.onnx"))
    refused(folder, r"graph 'step' is in unlisted file '\.\./step\.onnx'")


def test_graph_missing(folder):
    toy_bundle.resign(folder, lambda data: data["graphs"].pop("step"))
    refused(folder, "the plan calls graph 'step'")


@pytest.mark.parametrize(
    "change", [{"offset": 10**6}, {"offset": -64}, {"nbytes": 4}, {"shape": [-1, -2]}, {"dtype": "float16"}]
)
def test_table_outside_weights(folder, change):
    toy_bundle.resign(folder, lambda data: data["plan"]["tables"]["tab"].update(change))
    refused(folder, r"table 'tab' does not lie within weights\.data")


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"x": {}}},
        {"files": {"x": {"sha256": "0", "size": "1"}}},
        {"graphs": {"step": 3}},
        {"layers": [3]},
        {"targets": {"x": 3}},
        {"surprise": 1},
        {"model": None},
    ],
)
def test_malformed_but_signed(folder, change):
    toy_bundle.resign(folder, lambda data: data.update(change))
    refused(folder, r"manifest\.json: is malformed")


def test_symbolic_links(folder, tmp_path):
    target = tmp_path / "weights.data"
    (folder / "weights.data").rename(target)
    (folder / "weights.data").symlink_to(target)
    refused(folder, r"weights\.data: a symbolic link that leaves the bundle; copy the bundle with `cp -rL`")
    target.unlink()
    (folder / "weights.data").unlink()
    (folder / "weights.data").symlink_to("gone")
    refused(folder, "leads nowhere")


def test_linked_folder_and_reports(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "reports").symlink_to(tmp_path / "elsewhere")
    refused(folder, "leaves the bundle")
    (folder / "reports").unlink()
    (folder / "loop").symlink_to(".")
    refused(folder, "neither a file nor a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_does_not_hang(folder):
    (folder / "recipe.toml").unlink()
    os.mkfifo(folder / "recipe.toml")
    refused(folder, "neither a file nor a folder")


def test_not_a_bundle(tmp_path, folder):
    refused(tmp_path / "nowhere", "no such folder", InputError)
    refused(tmp_path, "not a bundle", InputError)
    refused(folder / "manifest.json", "a file, not a bundle.*did you mean .*toy", InputError)


def test_destination_is_taken(folder):
    with pytest.raises(InputError, match="toy: exists; choose another --out, or pass --overwrite"):
        toy_bundle.write(folder)


def test_overwrite_replaces_all_of_it(folder):
    (folder / "reports").mkdir()
    os.truncate(folder / "weights.data", 3)  # a damaged bundle may be replaced
    toy_bundle.write(folder, overwrite=True)
    Bundle.open(folder)
    assert not (folder / "reports").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["toy"]


def test_empty_folder_is_free(tmp_path):
    (tmp_path / "toy").mkdir()
    toy_bundle.write(tmp_path / "toy")
    Bundle.open(tmp_path / "toy")


def test_foreign_folders_are_never_touched(tmp_path, folder):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    (foreign / "manifest.json").write_text("{}")
    (folder / "chapter2.tex").write_text("more work")
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    link.symlink_to(foreign)
    for taken, message in [
        (foreign, "no intact bundle"),
        (folder, r"holds chapter2\.tex"),
        (file, "not a folder"),
        (link, "not a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            toy_bundle.write(taken, overwrite=True)
    assert (foreign / "chapter1.tex").read_text() == "years of work"
    assert (folder / "chapter2.tex").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"thesis", "toy", "file", "link"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_write_leaves_nothing(folder, error):
    before = (folder / "manifest.json").read_bytes()

    def interrupted():
        with BundleWriter(folder, overwrite=True) as out:
            out.weights.add("a", b"\0", "int8", (1,))
            raise error

    with pytest.raises(error):
        interrupted()
    assert (folder / "manifest.json").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["toy"]


def test_block_without_finish(tmp_path):
    with pytest.raises(RuntimeError, match="without finish"), BundleWriter(tmp_path / "toy") as out:
        out.write("a", b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk; free some"),
        (errno.EROFS, "the file system is read-only; write somewhere else"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_file_system_that_refuses_folder(tmp_path, monkeypatch, code, message):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=f"out: {message}"):
        toy_bundle.write(tmp_path / "out/toy")


def test_disk_full_in_the_middle(tmp_path, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qexport.bundle.weights.WeightFileWriter.add", full)
    with pytest.raises(InputError, match="toy: no space left on the disk"):
        toy_bundle.write(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full_for_real(tmp_path):
    def fill():
        with BundleWriter(tmp_path / "toy") as out:
            (out.path / "weights.data").symlink_to("/dev/full")
            out.weights.add("a", bytes(10), "int8", (10,))  # buffered: fails only when it is closed
            tables = {"tab": Table("float32", (), 0, 4), "drifts": Table("float32", (2,), 0, 8)}
            out.finish(toy_bundle.manifest(toy_bundle.plan(tables)))

    with pytest.raises(InputError, match="no space left on the disk"):
        fill()
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "toy") as out:
        (out.path / "nothing").read_bytes()
    with pytest.raises(InputError, match="may leave"), BundleWriter(tmp_path / "toy") as out:
        out.write("../x", b"")
    assert not list(tmp_path.iterdir())


def test_failing_swap_restores_the_old_bundle(folder, monkeypatch):
    rename = Path.rename

    def fail_second(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(InputError, match="permission denied"):
        toy_bundle.write(folder, overwrite=True)
    Bundle.open(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["toy"]


def test_killed_process_leaves_the_destination_free(tmp_path):
    stale = tmp_path / f".toy.partial-{os.getpid()}"
    stale.mkdir()  # what a killed process of the same id leaves
    toy_bundle.write(tmp_path / "toy")
    Bundle.open(tmp_path / "toy")
    assert stale.exists()  # it might belong to somebody else's machine


def test_sigint_leaves_nothing(tmp_path):
    script = f"""
import os, signal
from qexport.bundle import BundleWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
with BundleWriter({str(tmp_path / "toy")!r}) as out:
    out.weights.add("a", b"0", "int8", (1,))
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_everything_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda _: order.append("sync"))
    publish = writer.BundleWriter._publish
    monkeypatch.setattr(writer.BundleWriter, "_publish", lambda self: (order.append("publish"), publish(self)))
    toy_bundle.write(tmp_path / "toy")
    assert order == ["sync"] * 7 + ["publish", "sync"]  # 5 files, the manifest, the folder; then its parent
