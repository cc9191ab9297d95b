"""`qexport models`: what can be loaded, and whether its weights are here."""

from __future__ import annotations

from typing import Any

from qexport_cli.options import JsonOption
from qexport_cli.progress import work
from qexport_cli.render import Column, number, print_facts, print_json, print_line, print_table

COLUMNS = (
    Column("model"),
    Column("pixels", right=True),
    Column("params", right=True),
    Column("licence"),
    Column("from", right=True),
    Column("weights"),
    Column("file", wide_only=True, fold=True),
)


def models(json: JsonOption = False) -> None:
    """List the models that can be quantised.

    Says where the weights of each come from, under which licence, and whether they are here.
    """
    with work():  # torch is imported here, and what it prints belongs on stderr
        from qexport_models.checkpoints import BUNDLED, checkpoint_folder
        from qexport_models.published import is_cached

        from qexport.family import families

        folder = checkpoint_folder()
        files = {file for family in families() for entry in family.entries if not entry.bundled for file in entry.files}
        # Bundled file by file: a reference model that is not may still have a decoder that is.
        places = (BUNDLED, folder)
        here = {file for file in files if any((place / file).is_file() for place in places) or is_cached(file)}
        rows: list[dict[str, Any]] = [
            {
                "name": entry.name,
                "family": entry.family,
                "image_size": entry.image_size,
                "num_classes": entry.num_classes,
                "parameters": entry.parameters,
                "licence": entry.licence,
                "source": entry.source,
                "files": list(entry.files),
                "bundled": entry.bundled,
                "published": entry.published,
                "missing": [] if entry.bundled else [file for file in entry.files if file not in here],
            }
            for family in families()
            for entry in family.entries
        ]
    if json:
        print_json({"checkpoint_folder": str(folder), "models": rows})
        return
    origins = list(dict.fromkeys(_origin(row) for row in rows))
    print_table(
        COLUMNS,
        (
            (
                row["name"],
                row["image_size"],
                number(row["parameters"]),
                row["licence"].partition(":")[0],
                origins.index(_origin(row)) + 1,
                _weights(row),
                row["files"][0],
            )
            for row in rows
        ),
    )
    print_line()
    print_facts({f"from {i}": origin for i, origin in enumerate(origins, start=1)})
    print_line()
    print_line(f"files are looked for in {folder}, then in the cache of the Hugging Face Hub")
    print_line("(QEXPORT_CHECKPOINTS names another folder, --checkpoint and --vae-checkpoint name single files)")


def _origin(row: dict[str, Any]) -> str:
    decoder = f", decoder in {', '.join(row['files'][1:])}" if row["files"][1:] else ""
    return f"{row['source']}; {row['licence']}{decoder}"


def _weights(row: dict[str, Any]) -> str:
    if row["bundled"]:
        return "bundled"
    if not row["missing"]:
        return "here"
    return "to fetch" if row["published"] else "your own"
