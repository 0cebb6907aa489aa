"""The assistant's command. It imports nothing heavy before it is called."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from edgealign import recipe as recipes
from edgealign.chat.recipes import AppRecipe
from edgealign.cli_options import AdapterOption, ConfigOption, Overrides, directories, takes_recipe

PORT = 8765


@takes_recipe(AppRecipe)
def app(
    *,
    bundle: Annotated[
        str | None, typer.Option("--bundle", help="an exported bundle, or a model directory; none: the starter as GGUF")
    ] = None,
    adapter: AdapterOption = None,
    basis: Annotated[
        str | None,
        typer.Option("--basis", help="what users may differ in, for choices to teach; none: the starter's, if it fits"),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="on 127.0.0.1; 0 takes a free one")] = PORT,
    token: Annotated[
        str | None, typer.Option("--token", help="what opens the page and the API; none: the one in --home")
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option("--home", help="what is kept, and the token; none: EDGEALIGN_HOME, or ~/.local/share/edgealign"),
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="only print the address")] = False,
    config: ConfigOption = None,
    json: Annotated[bool, typer.Option("--json", help="print the address and the token as JSON")] = False,
    overrides: Overrides,
) -> None:
    """The assistant on this machine: a page in the browser, and OpenAI's API, over a bundle or the starter."""
    recipe = recipes.load(AppRecipe, config, overrides)
    from edgealign import apps
    from edgealign.personalize.users import home_folder, users_folder

    server = apps.load("assistant.server")

    def tell(address: Any) -> None:
        facts = {"page": address.page, "api": f"{address.url}/v1", "token": address.token}
        print(jsonlib.dumps(facts) if json else f"page {facts['page']}\napi  {facts['api']}", flush=True)

    server.serve(
        source=bundle, adapters=directories(adapter), home=home or home_folder(), port=port, token=token,
        browser=not no_browser, recipe=recipe, ready=tell, basis=basis, users=users_folder(home),
    )  # fmt: skip
