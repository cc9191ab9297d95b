"""What a lowered graph says of itself, as keys of its metadata."""

DTYPE_KEY = "qexport.dtype"
"""What it computes in."""

JOINED_KEY = "qexport.joined"
"""JSON: the initialiser of joined weights → those that lie in it, in their order."""
