"""`qexport doctor`: what is installed here, and whether it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from qexport_cli.options import JsonOption
from qexport_cli.progress import work
from qexport_cli.render import Column, print_facts, print_json, print_line, print_table, size


def doctor(json: JsonOption = False) -> None:
    """Show versions and hardware, and try what qexport needs.

    Exits with 1 if not even a bundle could be played.
    """
    with work() as report:
        from qexport_cli.health import environment, run_checks

        facts = environment()
        checks = run_checks(report)
    passed = all(check.ok or not check.required for check in checks)
    if json:
        print_json({"passed": passed, **facts, "checks": [asdict(check) for check in checks]})
    else:
        _show_environment(facts)
        print_line()
        columns = (Column("check"), Column(""), Column("", fold=True))
        # What fails but is not required is no cross: a machine without a GPU is in order.
        rows = [(check.name, check.ok or (False if check.required else None), check.detail) for check in checks]
        print_table(columns, rows)
    if not passed:
        raise typer.Exit(1)


def _show_environment(facts: Mapping[str, Any]) -> None:
    cpu, memory = facts["cpu"], facts["memory_bytes"]
    free = f"{size(memory['available'])} free of " if memory["available"] else ""
    print_facts(
        {
            **{name: version or "not installed" for name, version in facts["versions"].items()},
            "providers": ", ".join(facts["providers"]) or None,
            "system": facts["system"],
            "CPU": f"{cpu['model']}, {cpu['usable']} of {cpu['cores']} cores usable",
            "memory": free + (size(memory["total"]) or "unknown"),
            "CUDA devices": facts["cuda_devices"] or "none",
        }
    )
