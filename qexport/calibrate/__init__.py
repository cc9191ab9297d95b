"""What flows into the layers while the full-precision model samples: recorded, replayed, counted, measured."""

from qexport.calibrate.activation import choose, remarks_on
from qexport.calibrate.histogram import Histogram
from qexport.calibrate.record import Recording, record, step_of
from qexport.calibrate.replay import Replay, Stage, Tap, stages
from qexport.calibrate.shelf import RecordedCall, Shelf, Trajectory
from qexport.calibrate.shown import require_encoder
from qexport.calibrate.sums import InputSums, rows_of

__all__ = [
    "Histogram",
    "InputSums",
    "RecordedCall",
    "Recording",
    "Replay",
    "Shelf",
    "Stage",
    "Tap",
    "Trajectory",
    "choose",
    "record",
    "remarks_on",
    "require_encoder",
    "rows_of",
    "stages",
    "step_of",
]
