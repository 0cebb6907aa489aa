"""The on-device assistant: an OpenAI-compatible server over any bundle, and the store of what its user said and chose.

    edgealign app

A package of its own beside the library: `apps/` in a checkout, `edgealign/_apps` in a wheel; `edgealign.apps` finds it.
"""
