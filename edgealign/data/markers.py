"""Traces of other chat templates in the text: sooner or later a model trained on them writes them.

The usual origin is a data set that was saved after somebody's template had been applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MARKERS = {
    "<|im_start|>": "ChatML",
    "<|im_end|>": "ChatML",
    "<|startoftext|>": "LFM2",
    "<|endoftext|>": "GPT",
    "<|begin_of_text|>": "Llama 3",
    "<|start_header_id|>": "Llama 3",
    "<|eot_id|>": "Llama 3",
    "<|header_start|>": "Llama 4",
    "<|eot|>": "Llama 4",
    "[INST]": "Llama 2, Mistral",
    "[/INST]": "Llama 2, Mistral",
    "<<SYS>>": "Llama 2",
    "</s>": "Llama 2, Mistral, Zephyr",
    "<start_of_turn>": "Gemma",
    "<end_of_turn>": "Gemma",
    "<|user|>": "Zephyr, Phi",
    "<|assistant|>": "Zephyr, Phi",
    "<|system|>": "Zephyr, Phi",
    "<|start|>": "Harmony",
    "<|message|>": "Harmony",
    "<|START_OF_TURN_TOKEN|>": "Command R",
    "### Instruction": "Alpaca",
    "### Response": "Alpaca",
    "\n\nHuman:": "Anthropic HH",
    "\n\nAssistant:": "Anthropic HH",
    "USER:": "Vicuna",
    "ASSISTANT:": "Vicuna",
}
_AT_LINE_START = {"USER:", "ASSISTANT:"}  # elsewhere they are ordinary capitals
_PATTERN = re.compile(
    "|".join(
        rf"(?:^{re.escape(marker)})" if marker in _AT_LINE_START else re.escape(marker)
        for marker in sorted(MARKERS, key=len, reverse=True)
    ),
    re.MULTILINE,
)


def find_markers(text: str) -> Iterator[str]:
    """The markers in a text, each as often as it stands there."""
    return (match.group() for match in _PATTERN.finditer(text))
