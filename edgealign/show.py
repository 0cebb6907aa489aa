"""`edgealign show`: an artifact's facts and family tree, from manifests alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from edgealign.artifact import Check, open_artifact
from edgealign.lineage import Ancestor, lineage


def describe(directory: Path, *, check_digests: bool = True) -> dict[str, Any]:
    """Everything the manifest says, the size, and the ancestors that are still where they were.

    Raises:
        ArtifactError: not an artifact, or damaged.
    """
    artifact = open_artifact(directory, check_digests=check_digests)
    described = dataclasses.asdict(artifact.manifest)
    described["path"] = str(directory)
    described["bytes"] = sum(entry.bytes for entry in artifact.manifest.files)
    described["lineage"] = _tree(lineage(directory))
    return described


def render(described: dict[str, Any]) -> str:
    """The description as a person reads it."""
    lines = [
        f"{described['path']}: {described['kind']} ({described['format']}), made by {described['stage']}",
        f"digest {described['digest'][:16]}  {_size(described['bytes'])}  {len(described['files'])} files",
    ]
    if described["checks"]:
        lines.append(render_checks([Check(**check) for check in described["checks"]]))
    for name, value in described["meta"].items():
        if isinstance(value, (str, int, float, bool)):
            lines.append(f"  {name}: {value}")
    lines.append("ancestry")
    lines += _branches(described["lineage"], depth=1)
    return "\n".join(lines)


def render_checks(checks: list[Check]) -> str:
    """A line for each check: verdict, name, value against tolerance."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        verdict = "ok    " if check.passed else "FAILED"
        value = "" if check.value is None else f"{check.value:.4g}"
        tolerance = "" if check.tolerance is None else f"(tolerance {check.tolerance:.4g})"
        lines.append(f"  {verdict} {check.name:<{width}}  {value} {tolerance} {check.note}".rstrip())
    return "\n".join(lines)


def _tree(node: Ancestor) -> dict[str, Any]:
    return {
        "role": node.entry.role,
        "kind": node.entry.kind,
        "digest": node.entry.digest,
        "hint": node.entry.hint,
        "stage": node.manifest.stage if node.manifest else None,
        "parents": [_tree(parent) for parent in node.parents],
    }


def _branches(node: dict[str, Any], *, depth: int) -> list[str]:
    missing = "a file" if node["kind"] == "file" else "not here"
    made = f"made by {node['stage']}" if node["stage"] else missing
    lines = [f"{'  ' * depth}{node['role']}: {node['kind']} {node['digest'][:16]} {Path(node['hint']).name} ({made})"]
    for parent in node["parents"]:
        lines += _branches(parent, depth=depth + 1)
    return lines


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"
