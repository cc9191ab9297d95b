"""Names of the files in a bundle's ``reports/``, which nothing hashes: what was measured while it was made."""

from __future__ import annotations

COMPARE_REPORT = "compare.json"
"""`quantize --compare`: a row for each method."""

SENSITIVITY_REPORT = "sensitivity.json"
"""`quantize --method auto`: what each layer loses in each format, and which it was given."""

SENSITIVITY_PLOT = "sensitivity.svg"
"""The same as a picture."""

TRAINING_REPORT = "training.json"
"""`quantize --topkld`: the course of the training."""
