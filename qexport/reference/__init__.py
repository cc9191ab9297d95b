"""The model in torch: played by the same sampling plan as a bundle, tapped for calibration, quantised as the twin."""

from qexport.reference.backend import TorchBackend, torch_player
from qexport.reference.fake_quant import fake_quantise
from qexport.reference.fold import apply_fold, apply_folds
from qexport.reference.interception import After, Interception, Window, layer_weights
from qexport.reference.quantised import QuantisedModule

__all__ = [
    "After",
    "Interception",
    "QuantisedModule",
    "TorchBackend",
    "Window",
    "apply_fold",
    "apply_folds",
    "fake_quantise",
    "layer_weights",
    "torch_player",
]
