"""Turn another program's measurements into our report, so that a phone's row stands beside the laptop's.

    run(Path("bench.json"), device=["device=Pixel 9", "cores_usable=8"], bundle=Path("runs/bundle"), out=Path("phone"))

The machine card has what the file says and what `--device` adds; everything else is unknown, and stays so. With the
bundle that ran, size, KL and bytes read for a token come from its files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Check, file_input, open_artifact, publish, refuse_existing, sha256_file
from edgealign.bench.foreign import Foreign, read_foreign
from edgealign.bench.machine import QUIET, busy
from edgealign.bench.report import render
from edgealign.bench.rows import describe_model, describe_seconds
from edgealign.bench.run import SCHEMA, write_report
from edgealign.errors import InputError, UsageError
from edgealign.registry import suggest
from edgealign.runtimes.session import Bundle, read_bundle

# What a machine card may hold, and of which type; `bandwidth_gb_s` is what the maker or another program states.
CARD: Mapping[str, type] = {
    "device": str, "cpu": str, "architecture": str, "flags": list, "cores_usable": int, "cores_logical": int,
    "ram_bytes": int, "cache_bytes": int, "governor": str, "virtual_machine": bool, "os": str, "kernel": str,
    "libc": str, "python": str, "versions": dict, "load_average_before": list, "cpu_busy_before": float,
    "bandwidth_gb_s": float,
}  # fmt: skip
MOST_ITEMS, LONGEST_TEXT = 100, 500


def run(
    file: Path, *, device: Sequence[str], out: Path, bundle: Path | None = None, threads: int | None = None
) -> Artifact:
    """Read, check and publish; `device` items are a card's JSON file or `name=value`.

    Raises:
        InputError: the file holds no measurements, or those of another model than the bundle's.
        UsageError: a device fact that a machine card does not have.
    """
    file, out = Path(file), Path(out)
    refuse_existing(out)
    foreign = read_foreign(file, threads=threads)
    given = read_card(device)
    opened = read_bundle(bundle) if bundle is not None else None
    result = make_result(foreign, given, opened)
    result["text"] = render(result)
    inputs = [file_input(foreign.source, file, sha256_file(file))]
    if opened is not None:
        inputs.append(open_artifact(opened.path, check_digests=False).as_input("bundle"))
    recipe = {"source": foreign.source, "device": given, "threads": threads}
    with publish(out, kind="report", format="bench", stage="bench import", recipe=recipe, inputs=inputs) as draft:
        write_report(draft, result)
        note = "; ".join(result["caveats"]) or "nothing speaks against it"
        draft.add_check(Check("bench.comparable", None, None, True, note))
    return open_artifact(out)


def make_result(foreign: Foreign, given: Mapping[str, Any], bundle: Bundle | None) -> dict[str, Any]:
    """The rows as a result of ours."""
    card: dict[str, Any] = {**dict.fromkeys(CARD), "versions": {}, "cpu": foreign.cpu}
    stated = given.get("bandwidth_gb_s")
    card.update({name: value for name, value in given.items() if name != "bandwidth_gb_s"})
    card["versions"] = {**foreign.versions, **card["versions"]}
    del card["bandwidth_gb_s"]
    caveats = list(foreign.caveats)
    if card["cpu_busy_before"] is None:
        caveats.append(f"imported from {foreign.source}: how busy the device was is not known")
    elif busy(card):
        caveats.append(f"the device was busy: {card['cpu_busy_before']:.0%} of its cores, at most {QUIET:.0%} is quiet")
    if bundle is not None:
        _check_same_model(foreign, bundle)
        for row in foreign.rows:
            row.update(bundle=bundle.path.resolve().name, quant=bundle.quant, target=bundle.target)
    return {
        "schema": SCHEMA,
        "source": foreign.source,
        "comparable": not caveats,
        "caveats": caveats,
        "notes": foreign.notes,
        "machine": card,
        "recipe": {},
        "results": foreign.rows,
        "bundles": _describe(foreign, bundle),
        "bandwidth": [_stated_bandwidth(stated)] if stated else [],
    }


def read_card(items: Sequence[str]) -> dict[str, Any]:
    """Facts of a device, from JSON files of machine cards and from `name=value`, later ones over earlier ones.

    Raises:
        UsageError: a name that a card does not have, or a value of another type.
        InputError: a file that is no card.
    """
    card: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if equals and not item.endswith(".json"):
            card[name] = _convert(item, name, value)
        else:
            card.update(_read_card_file(Path(item)))
    return card


def _read_card_file(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(file, f"is no machine card ({type(error).__name__})", "give JSON or NAME=VALUE") from error
    if not isinstance(raw, dict) or not raw:
        raise InputError(file, "is no machine card", "it is the `machine` part of a report's result.json")
    return {name: _convert(f"{file}: {name}", name, value) for name, value in raw.items() if value is not None}


def _convert(item: str, name: str, value: Any) -> Any:
    """A fact as the card's type; text from the command line is read as that type."""
    if name not in CARD:
        raise UsageError(item, f"is no fact of a machine card{suggest(name, CARD)}", f"known: {', '.join(CARD)}")
    kind = CARD[name]
    word = "text" if kind is str else kind.__name__
    wrong = UsageError(item, f"is no {word} that a card can hold", "check the value")
    if isinstance(value, str) and kind is not str:
        words = {"true": True, "yes": True, "false": False, "no": False}
        try:
            if kind is bool:
                value = words[value.lower()]
            elif kind is list:
                value = value.replace(",", " ").split()
            else:
                value = json.loads(value)
        except (KeyError, ValueError, RecursionError) as error:
            raise wrong from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e15 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    if isinstance(value, (int, float)) and not 0 <= value < 1e18:  # nan is in no range
        raise wrong
    if isinstance(value, (list, dict)) and not _is_plain(value):
        raise wrong
    if isinstance(value, str):
        value = _line(value)
    if name == "cpu_busy_before" and value > 1:
        raise UsageError(item, "is a share of the cores, from 0 to 1", "0.05 says that a twentieth was in use")
    return value


def _is_plain(value: list[Any] | dict[str, Any]) -> bool:
    """Few short texts or finite numbers."""
    items = list(value) if isinstance(value, list) else [*value.keys(), *value.values()]
    return len(items) <= MOST_ITEMS and all(
        (isinstance(item, str) and len(item) <= LONGEST_TEXT)
        or (isinstance(item, (int, float)) and not isinstance(item, bool) and abs(item) < 1e18)
        for item in items
    )


def _line(text: str) -> str:
    kept = "".join(char if char.isprintable() and char not in "|`<>" else " " for char in text[:LONGEST_TEXT])
    return " ".join(kept.split())


def _check_same_model(foreign: Foreign, bundle: Bundle) -> None:
    """The measurements must be of this bundle's model file, as far as they tell."""
    if bundle.target != foreign.target:
        reason = f"is a bundle for {bundle.target}, the measurements are {foreign.source}'s"
        raise InputError(bundle.path, reason, "give the bundle that ran")
    if len({row["model_filename"] for row in foreign.rows}) > 1:
        reason = "is one bundle, the measurements are of several models"
        raise InputError(bundle.path, reason, "import without --bundle")
    if bundle.target == "gguf":
        from edgealign.runtimes.gguf_header import check_gguf

        weights = sum(tensor.bytes for tensor in check_gguf(bundle.model_file).tensors)
        measured = {row["model_size"] for row in foreign.rows} - {None}
        if measured and measured != {weights}:
            reason = f"holds {weights:,} bytes of weights, what was measured {min(measured):,}"
            raise InputError(bundle.path, reason, "give the bundle that ran")


def _describe(foreign: Foreign, bundle: Bundle | None) -> list[dict[str, Any]]:
    """One entry for each model; without its bundle only what the rows say."""
    entries = []
    for row in {row["bundle"]: row for row in foreign.rows}.values():
        known: dict[str, Any] = {
            "bundle": row["bundle"], "target": row["target"], "quant": row["quant"], "digest": None,
            "model_digest": None, "file_bytes": row.get("model_size"), "adapter_bytes": {},
            "fidelity": {"kl": None, "largest_logit_gap": None, "change_kept": {}, "origin": None},
            "token_bytes": {"bytes": None, "how": "its bundle was not given"},
        }  # fmt: skip
        if bundle is not None:
            known = describe_model(row["bundle"], bundle, open_artifact(bundle.path, check_digests=False))
        entries.append({
            **known, "model_n_params": row.get("model_n_params"), "system_info": None,
            "load_s": describe_seconds(foreign.load_ns or None), "load_threads": row["n_threads"],
            "loaded_from": "as the runner found it", "adapter_load_s": None, "swap_s": None, "swap_threads": None,
            "prompt_after_swap_s": None, "prompt_s": None, "errors": [],
        })  # fmt: skip
    return entries


def _stated_bandwidth(gb_per_s: float) -> dict[str, Any]:
    return {"threads": None, "bytes_per_s": gb_per_s * 1e9, "samples": [], "buffer_bytes": None, "error": None}
