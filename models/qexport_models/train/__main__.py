"""`python -m qexport_models.train`."""

from qexport_models.train.command import main

if __name__ == "__main__":
    raise SystemExit(main())
