"""Find the programs of `apps/`: in a checkout they lie beside the library, a wheel carries them as `edgealign/_apps`.

Nothing in the library imports them by name; `load` makes a folder there importable and imports it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import edgealign
from edgealign.errors import ToolMissing

PACKAGE = Path(edgealign.__file__).resolve().parent
INSTALL = "pip install 'edgealign[app]'"


def folder(name: str) -> Path:
    """The folder that holds the app called `name`.

    Raises:
        ToolMissing: this installation came without its apps.
    """
    for place in (PACKAGE / "_apps", PACKAGE.parent / "apps"):
        if (place / name / "__init__.py").is_file():
            return place
    raise ToolMissing(name, "is missing from this installation", "pip install --force-reinstall edgealign")


def load(module: str) -> ModuleType:
    """Import a module of an app, like `assistant.server`.

    Raises:
        ToolMissing: the app, or a library that it needs, is not installed.
    """
    place = str(folder(module.partition(".")[0]))
    if place not in sys.path:
        sys.path.insert(0, place)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ToolMissing(error.name or module, "is not installed", f"install it with: {INSTALL}") from error
