"""A bundle, from its manifest; and its graphs, where onnx is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qexport.bundle import Bundle
from qexport.inspect.layers import LayerRow
from qexport.targets import fused_forms
from qexport.targets.fusion import use_of


@dataclass(frozen=True)
class GraphRow:
    """One .onnx file of a bundle; `opsets` and `operators` are None where onnx is not installed."""

    name: str
    file: str
    size_bytes: int
    opsets: Mapping[str, int] | None
    operators: Mapping[str, int] | None


@dataclass(frozen=True)
class BundleReport:
    """Everything about a bundle that can be known without running it; `size_bytes` is the sum of all its files."""

    bundle: Bundle
    layers: tuple[LayerRow, ...]
    graphs: tuple[GraphRow, ...]
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        manifest = self.bundle.manifest
        return {
            "kind": "bundle",
            "path": str(self.bundle.path),
            "model": asdict(manifest.model),
            "scheme": manifest.scheme,
            "dtype": manifest.dtype,
            "digest": manifest.digest,
            "checkpoints": dict(manifest.checkpoints),
            "qexport_version": manifest.qexport_version,
            "size_bytes": self.size_bytes,
            "totals": dict(manifest.totals),
            "inputs": [asdict(spec) for spec in manifest.plan.inputs],
            "targets": sorted(manifest.targets),
            "graphs": [asdict(graph) for graph in self.graphs],
            "files": {name: entry.size for name, entry in manifest.files.items()},
            "layers": [asdict(layer) for layer in self.layers],
        }


def inspect_bundle(path: str | Path) -> BundleReport:
    """Read the bundle in the folder `path`; sizes are checked, hashes are not.

    Raises:
        InputError: no bundle, or a damaged one.
    """
    bundle = Bundle.open(path, check="size")
    manifest = bundle.manifest
    return BundleReport(
        bundle=bundle,
        layers=tuple(_layer(row) for row in manifest.layers),
        graphs=tuple(_graph(bundle, name, file) for name, file in manifest.graphs.items()),
        size_bytes=sum(entry.size for entry in manifest.files.values()),
    )


def _layer(row: Mapping[str, Any]) -> LayerRow:
    quantized = bool(row.get("algorithm"))
    return LayerRow(
        name=str(row.get("name")),
        graph=str(row.get("graph")),
        shape=tuple(row.get("shape", ())),
        format=str(row.get("format", "?")),
        granularity=row.get("granularity"),
        group_size=row.get("group_size"),
        bits_per_weight=row.get("bits_stored"),
        size_bytes=row.get("size_bytes"),
        quantized=quantized,
        algorithm=row.get("algorithm"),
        sqnr_db=row.get("sqnr_db"),
        fused=fused_forms(use_of(row)) if quantized else {},
    )


def _graph(bundle: Bundle, name: str, file: str) -> GraphRow:
    size = bundle.manifest.files[file].size
    try:
        from qexport.inspect.onnx_file import operators_of, opsets_of, read_model
    except ModuleNotFoundError:
        return GraphRow(name, file, size, None, None)
    model = read_model(bundle.path / file)
    return GraphRow(name, file, size, opsets_of(model), operators_of(model))
