"""Inception-v3, the network whose features FID and the Inception Score are defined by.

The network is torch-fidelity's, which follows the TensorFlow graph of 2015 that the figures are defined with to the
last detail: images uint8, enlarged as TensorFlow 1 does it (corners not aligned, no antialiasing), (x − 128) / 128,
2048 pooled features, and 1008 logits without their bias. The weights are the user's file; nothing is downloaded.

Legend: B images; pixels are uint8 (B, H, W, 3).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qexport.checkpoint import open_checkpoint, sha256
from qexport.errors import CheckpointError, InputError
from qexport.family import INCEPTION
from qexport.reference.device import choose_device
from qexport.runtime.pixels import to_pixels
from qexport.verify.statistics import Statistics

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""The published conversion of the TensorFlow weights, by the name pytorch-fid gives it; torch-fidelity's is the same
file as weights-inception-2015-12-05-6726825d.pth."""

WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of that file. With any other, what is measured is a Fréchet distance, but not FID."""

FEATURES = 2048
LOGITS = 1008


class Network(Protocol):
    """Pixels (B, 3, H, W) uint8 → features (B, 2048) and logits without bias (B, 1008), float32."""

    def __call__(self, pixels_BCHW: Tensor, /) -> tuple[Tensor, Tensor]:
        """See class."""
        ...


class InceptionExtractor:
    """A `qexport.family.FeatureExtractor` that also gives the logits of the Inception Score in the same pass."""

    def __init__(
        self, network: Network, weights_sha256: str, device: str = "cpu", reference: Statistics | None = None
    ) -> None:
        """For a network on `device`; `reference` are the statistics of real images, where FD is to be measured."""
        self._network, self.weights_sha256, self.device = network, weights_sha256, device
        self.reference = reference

    @property
    def published(self) -> bool:
        """Whether the weights are the ones that FID is defined by."""
        return self.weights_sha256 == WEIGHTS_SHA256

    @property
    def name(self) -> str:
        """``Inception-v3``, or, with other weights, which."""
        return INCEPTION if self.published else f"{INCEPTION} with weights {self.weights_sha256[:8]}"

    @property
    def mu(self) -> np.ndarray:
        """See `FeatureExtractor`."""
        return self._real().mu

    @property
    def cov(self) -> np.ndarray:
        """See `FeatureExtractor`."""
        return self._real().cov

    def features(self, images: Tensor) -> Tensor:
        """See `FeatureExtractor`. Images are rounded to 8 bits first, as those that figures are published for are."""
        return torch.from_numpy(self.observe(to_pixels(images.cpu().numpy()))[0])

    @torch.no_grad()
    def observe(self, pixels_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (B, 2048) and logits (B, 1008) of uint8 images, float32."""
        pixels_BCHW = torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2))).to(self.device)
        # TF32 keeps 10 bits of each factor, which shows in the third digit of features.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if self.device != "cpu" else nullcontext()
        with exact:
            features, logits = self._network(pixels_BCHW)
        return features.cpu().numpy(), logits.cpu().numpy()

    def _real(self) -> Statistics:
        if self.reference is None:
            raise InputError("no statistics of real images; pass a reference")
        return self.reference


def load_inception(path: str | Path, provider: str = "auto") -> InceptionExtractor:
    """The network with the weights of a file.

    Args:
        path: a state dict, see `WEIGHTS`; any file that `qexport.checkpoint` opens.
        provider: ``cpu``, ``cuda``, or ``auto``: CUDA where torch has it.

    Raises:
        InputError: torch-fidelity is not installed or cannot be imported, or there is no such device.
        CheckpointError: the file cannot be read, or holds another network.
    """
    device = choose_device(provider)
    checkpoint = open_checkpoint(path)
    network = _network(checkpoint.state, checkpoint.path).to(device)
    return InceptionExtractor(network, sha256(checkpoint.path), device)


def _network(state: Mapping[str, Tensor], path: Path) -> Any:
    """torch-fidelity's network with these weights."""
    base = _import_network()

    class Loaded(base):
        """Takes the tensors that are open already."""

        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            fit(self.state_dict(), state, path)
            return super().load_state_dict(state)

    # The constructor would unpickle any file that it is given, code and all, and without one would download it. It gets
    # an empty one; the weights were read by `qexport.checkpoint`, which runs nothing in them.
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Loaded("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _import_network() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except ModuleNotFoundError as error:
        raise InputError(
            f"FID and IS need qexport[fid]: pip install 'qexport[fid]' ({error.name} is not installed)"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:  # torchvision, built for another torch, fails in its own ways
        raise InputError(
            f"torch-fidelity cannot be imported ({str(error).splitlines()[0][:80]}); "
            f"install the torchvision that belongs to torch {torch.__version__}"
        ) from error
    return FeatureExtractorInceptionV3


def fit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Check that the tensors `found` in a file are those `wanted`; counts of batches seen in training may be missing.

    Raises:
        CheckpointError: naming the first that does not fit.
    """
    hint = f"the weights that FID is defined by are {WEIGHTS}"
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in found:
            raise CheckpointError(f"{path}: holds no {name}; {hint}")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}; {hint}")
    surplus = sorted(set(found) - set(wanted))
    if surplus:
        raise CheckpointError(f"{path}: holds {surplus[0]}, which this network lacks; {hint}")
