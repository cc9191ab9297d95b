"""The network: weights that fit, and figures that are those of torch-fidelity's own `calculate_metrics`.

The published weights are not at hand, so the network gets random ones. torch-fidelity is not among the developer tools
(`pyproject.toml` says why); `pip install --no-deps torch-fidelity tqdm` is enough here: of torchvision nothing is used.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import types

import numpy as np
import pytest
import torch
from inception_support import Stand, blocks, write_folder

from qexport.checkpoint import sha256
from qexport.errors import CheckpointError, InputError
from qexport.reference.device import choose_device
from qexport.verify import inception_run
from qexport.verify.inception import WEIGHTS_SHA256, InceptionExtractor, fit, load_inception
from qexport.verify.inception_run import open_extractor, score

AGREEMENT = 1e-4
"""Relative, of FID. torch-fidelity takes roots of 2048 eigenvalues of a product that has rank 3. Those that are zero
come out as 1e-16 of the greatest, their roots as 1e-8 each, 4e-5 in all."""

SCORE_AGREEMENT = 1e-5
"""Relative, of IS − 1 and its deviation. Logits are float32; batches of another size round them otherwise (6e-8)."""

SEEN = 0.02
"""Least relative change of FID by a mistake in what the network is given: far beyond the agreement asked for."""

needs_fidelity = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity: pip install 'qexport[fid]'"
)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity; where torchvision is missing or was built for another torch, empty modules stand in for it."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    with pytest.MonkeyPatch.context() as patch:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError):
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                patch.delitem(sys.modules, name)
            for name in names:
                patch.setitem(sys.modules, name, types.ModuleType(name))
                above, _, own = name.rpartition(".")
                if above:
                    setattr(sys.modules[above], own, sys.modules[name])
            for name in ("CIFAR10", "CIFAR100", "STL10"):
                setattr(sys.modules[names[1]], name, object)
            sys.modules[names[2]].Compose = lambda steps: steps[-1]  # pyright: ignore[reportAttributeAccessIssue]
            sys.modules[names[3]].pil_to_tensor = (  # pyright: ignore[reportAttributeAccessIssue]
                lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)
            )
        yield importlib.import_module("torch_fidelity")


@pytest.fixture(scope="module")
def weights(fidelity, tmp_path_factory):
    """Random weights under which activations keep their size (He et al. 2015), so that images tell apart."""

    class Untrained(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name == "fc.weight":
            tensor.normal_(0, 1, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Folders of images: generated ones, and real ones of another colour."""
    root = tmp_path_factory.mktemp("images")
    tints = ((1.0, 0.6, 0.2), (0.8, 0.8, 0.6))
    return [write_folder(root / f"side{i}", blocks(4, i, tint, 12, 3)) for i, tint in enumerate(tints)]


@needs_fidelity
@pytest.mark.slow
def test_figures_are_those_of_torch_fidelity(fidelity, weights, sides):
    theirs = fidelity.calculate_metrics(
        input1=str(sides[0]), input2=str(sides[1]), fid=True, isc=True, isc_splits=2, cuda=False, batch_size=4,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    extractor = load_inception(weights, "cpu")
    ours = score(sides[:1], extractor, sides[1:], splits=2, batch=3)
    assert ours.fid is not None
    assert ours.fid.value == pytest.approx(theirs["frechet_inception_distance"], rel=AGREEMENT)
    assert ours.inception_score.value - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=SCORE_AGREEMENT)
    assert ours.inception_score.deviation == pytest.approx(theirs["inception_score_std"], rel=SCORE_AGREEMENT)
    # No other figure would have done: channels in another order, images enlarged otherwise.
    network = extractor._network
    for change in (lambda x: x.flip(1), enlarged):
        wrong = InceptionExtractor(lambda x, change=change: network(change(x)), extractor.weights_sha256)
        found = score(sides[:1], wrong, sides[1:], splits=2)
        assert found.fid is not None
        assert abs(found.fid.value / ours.fid.value - 1) > SEEN
        assert found.inception_score.value - 1 != pytest.approx(ours.inception_score.value - 1, rel=SEEN)


def enlarged(pixels):
    """As torch enlarges, pixel centres aligned, in place of what TensorFlow 1 does."""
    return torch.nn.functional.interpolate(pixels.float(), 299, mode="bilinear").round().to(torch.uint8)


@needs_fidelity
@pytest.mark.slow
def test_files_of_weights(fidelity, weights, tmp_path):
    state = torch.load(weights)
    extractor = load_inception(weights, "cpu")
    assert not extractor.published
    assert extractor.name == f"Inception-v3 with weights {sha256(weights)[:8]}"
    del state["fc.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part\.pth: holds no fc\.bias; the weights that FID is defined by"):
        load_inception(tmp_path / "part.pth", "cpu")


WANTED = {"fc.weight": torch.zeros(2, 3), "bn.num_batches_tracked": torch.tensor(0)}


class TestFit:
    def test_counts_of_batches_may_be_missing(self, tmp_path):
        fit(WANTED, {"fc.weight": torch.ones(2, 3)}, tmp_path)
        fit(WANTED, WANTED, tmp_path)

    @pytest.mark.parametrize(
        ("found", "says"),
        [
            ({}, r"holds no fc\.weight"),
            ({"fc.weight": torch.zeros(1, 3)}, r"fc\.weight is \(1, 3\), not \(2, 3\)"),
            ({"fc.weight": torch.zeros(2, 3), "AuxLogits.x": torch.zeros(1)}, r"holds AuxLogits\.x, which"),
        ],
    )
    def test_other_networks_are_refused(self, tmp_path, found, says):
        with pytest.raises(CheckpointError, match=f"{says}.* pt_inception"):
            fit(WANTED, found, tmp_path)


class TestExtractor:
    def test_is_what_a_model_could_bring(self):
        extractor = InceptionExtractor(Stand(), WEIGHTS_SHA256)
        assert extractor.published
        assert extractor.name == "Inception-v3"
        pixels = blocks(3, 0, (1, 0.5, 0.2))
        features, logits = extractor.observe(pixels)
        assert features.shape == (3, 2048)
        assert logits.shape == (3, 1008)
        # Floating-point images are rounded to the same bytes; a quarter of a step off makes no difference.
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        for shift in (0, 0.25 / 255):
            np.testing.assert_array_equal(extractor.features(images + shift).numpy(), features)
        assert not np.array_equal(extractor.features(images.flip(1)).numpy(), features)
        with pytest.raises(InputError, match="no statistics of real images"):
            _ = extractor.mu

    def test_brings_statistics_of_real_images(self, monkeypatch, tmp_path):
        loading = lambda path, provider: InceptionExtractor(Stand(), WEIGHTS_SHA256)  # noqa: E731
        monkeypatch.setattr(inception_run, "load_inception", loading)
        pixels = blocks(6, 1, (0.8, 0.8, 0.6))
        folder = write_folder(tmp_path / "real", pixels)
        extractor = open_extractor(tmp_path / "w.pth", [folder], (4, 4), batch=4)
        features = loading(None, None).observe(pixels)[0].astype(np.float64)
        np.testing.assert_allclose(extractor.mu, features.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(extractor.cov, np.cov(features, rowvar=False), atol=1e-4)
        other = [write_folder(tmp_path / "other", blocks(20, 2, (1, 0.6, 0.2)))]
        own, given = score(other, extractor).fid, score(other, loading(None, None), [folder]).fid
        assert own is not None
        assert given is not None
        assert own.value == pytest.approx(given.value, rel=1e-6)  # batches of other sizes round otherwise
        with pytest.raises(InputError, match="4×4, those to judge 8×4"):
            open_extractor(tmp_path / "w.pth", [folder], (4, 8))
        with pytest.raises(InputError, match=r"--reference .*gone: no such"):
            open_extractor(tmp_path / "w.pth", [tmp_path / "gone"], (4, 4))

    def test_devices(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device("auto") == choose_device("cpu") == "cpu"
        with pytest.raises(InputError, match="torch sees no CUDA device"):
            choose_device("cuda")
        with pytest.raises(InputError, match="'gpu' is unknown"):
            choose_device("gpu")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ModuleNotFoundError('No module', name='torchvision')", r"'qexport\[fid\]' \(torchvision is not inst"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", r"nms does not exist\); install the torchv"),
    ],
)
def test_without_the_extra(tmp_path, monkeypatch, code, says):
    (tmp_path / "torch_fidelity").mkdir()
    (tmp_path / "torch_fidelity" / "__init__.py").write_text(code)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "w.pth")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=says):
        load_inception(tmp_path / "w.pth", "cpu")
