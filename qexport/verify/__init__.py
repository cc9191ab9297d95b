"""Verify: proof that a bundle computes what the model computed, and how good and how fast it still is.

report = qexport.verify.verify("qexport-out/var-c10-d4-w4a16")
"""

from qexport.verify.checks import Check, Place, Skipped
from qexport.verify.ladder import verify
from qexport.verify.report import VerifyReport

__all__ = ["Check", "Place", "Skipped", "VerifyReport", "verify"]
