"""The models that come with edgealign, by name: `--model starter`, and `edgealign:starter` where a path is due.

A `str` that is exactly a built-in name is that model, whatever lies in the current directory: a command means the same
wherever it is run. A folder of the same name is reached as `./starter`, as its absolute path, or from Python as a
`Path`, which is always a path (`Path("./starter")` forgets the dot, so a `Path` can be no name). Inside a preset, where
a plain word is the id of an earlier stage, only the spelling with the prefix is a name.

Light: importing this loads no torch, and a name costs no more than looking whether its folder is there.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from edgealign.errors import InputError, ToolMissing
from edgealign.registry import suggest

PREFIX = "edgealign:"
NAMES = ("starter",)
BASES = ("starter-basis",)  # what users of the starter may differ in: `edgealign basis`


def built_in(source: str | Path, names: tuple[str, ...] = NAMES) -> Path | None:
    """The folder of the built-in thing that `source` names; None where it is not a name but a path or a hub id.

    Args:
        names: the models; `BASES` for a basis.

    Raises:
        InputError: the prefix, and no such thing.
        ToolMissing: this installation came without it.
    """
    if not isinstance(source, str) or not (source in names or source.startswith(PREFIX)):
        return None
    name, what = source.removeprefix(PREFIX), "basis" if names is BASES else "model"
    if name not in names:
        raise InputError(
            source, f"is no {what} that comes with edgealign{suggest(name, names)}",
            f"choose one of: {', '.join(PREFIX + known for known in names)}",
        )
    folder = home() / name
    if names is BASES and not (folder / "manifest.json").is_file():
        raise ToolMissing(name, "is missing from this installation", "make it: edgealign run starter-basis")
    if names is NAMES and not (folder / "config.json").is_file():
        fix = "pip install --force-reinstall edgealign; or make them: edgealign run starter, then edgealign package"
        raise ToolMissing(name, "its weights are missing from this installation", fix)
    return folder


def home() -> Path:
    """Where the built-in models lie: inside the package, in a checkout and in a wheel alike.

    Resolved, since an export program sees the package through a link that is gone when its message is read.
    """
    return Path(str(resources.files("edgealign"))).resolve()
