"""Which part of a GGUF model is stored in which type: groups of tensors, names for mixtures, what is searched.

A small model's decode speed is decided by a few groups: the head (with tied weights it is the embedding table too, and
is read whole for every token), attention, the convolutions' projections, the feed-forward's way down and its way up.
A mixture is a base quantisation, a type for the head and types for groups; its label says it all and is what a bundle
calls its quantisation:

    Mixture("q4_0", "q8_0", ("attn=q6_k",)).label          q4_0+head=q8_0+attn=q6_k
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from edgealign.errors import RecipeError
from edgealign.registry import suggest

# Matrices by their GGUF names; the head is `output.weight`, or the embedding table where both are one.
GROUPS: Mapping[str, str] = {
    "attn": r"\.attn_(q|k|v|output)\.weight$",
    "conv": r"\.shortconv\.(in|out)_proj\.weight$",
    "ffn_down": r"\.ffn_down(_exps)?\.weight$",
    "ffn_up": r"\.ffn_(up|gate)(_exps)?\.weight$",
}
HEAD, EMBEDDING, REST = "head", "embedding", "other"


class TensorType(NamedTuple):
    """ggml's number of a type, how many weights of a row make one block, and the parity gates it answers to."""

    number: int
    block: int
    bits: int


# What a head or a group can be stored as.
TYPES: Mapping[str, TensorType] = {
    "f16": TensorType(1, 1, 16), "q8_0": TensorType(8, 32, 8), "q6_k": TensorType(14, 256, 8),
    "q5_k": TensorType(13, 256, 4), "q5_1": TensorType(7, 32, 4), "q5_0": TensorType(6, 32, 4),
    "q4_k": TensorType(12, 256, 4), "q4_1": TensorType(3, 32, 4), "q4_0": TensorType(2, 32, 4),
    "iq4_nl": TensorType(20, 32, 4),
}  # fmt: skip
# What a search tries: bases, each with heads; None is llama.cpp's own head (Q6_K beside 4 to 6 bits).
SEARCHED: Mapping[str, tuple[str | None, ...]] = {
    "q4_0": (None, "q8_0", "q4_k", "q4_0"),
    "q4_k_s": (None, "q8_0", "q4_k", "q4_0"),
    "q4_k_m": (None, "q8_0", "q4_k", "q4_0"),
    "q5_k_m": (None, "q8_0"),
    "q6_k": (None, "q8_0"),
    "q8_0": (None, "q6_k"),
}
UNMIXED = ("f32", "f16")  # llama.cpp looks at no group's type where the base is a float


@dataclass(frozen=True)
class Mixture:
    """A base quantisation, and what is stored otherwise; `groups` are `group=type`, checked by `parse_groups`."""

    base: str
    head: str | None = None
    groups: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What a bundle's manifest, a table and a picture call it."""
        parts = [self.base, *([f"{HEAD}={self.head}"] if self.head else []), *self.groups]
        return "+".join(parts)


def parse_groups(entries: Iterable[str]) -> dict[str, str]:
    """`group=type` items by group, in the order of `GROUPS`.

    Raises:
        RecipeError: no such group or type, or a group that is named twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        group, equals, kind = (part.strip() for part in entry.partition("="))
        if not equals:
            raise RecipeError(entry, "is not group=type", "for example: tensor_types = ['attn=q8_0']")
        if group not in GROUPS:
            hint = " (that is head_type)" if group in (HEAD, EMBEDDING) else suggest(group, GROUPS)
            raise RecipeError(entry, f"names no group of tensors{hint}", f"groups: {', '.join(GROUPS)}")
        if kind not in TYPES:
            raise RecipeError(entry, f"names no type{suggest(kind, TYPES)}", f"types: {', '.join(TYPES)}")
        if group in found:
            raise RecipeError(entry, f"names {group} a second time", "give each group once")
        found[group] = kind
    return {group: found[group] for group in GROUPS if group in found}


def group_of(name: str, *, tied: bool) -> str:
    """The group of a GGUF tensor."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return HEAD
    if name == "token_embd.weight":
        return EMBEDDING
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), REST)


def count_types(tensors: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """How many matrices of each group have which type.

    Args:
        tensors: name, type and number of dimensions of every tensor in a file. Vectors (norms) are left out.
    """
    known = list(tensors)
    tied = all(name != "output.weight" for name, _, _ in known)
    found: dict[str, dict[str, int]] = {}
    for name, kind, dimensions in known:
        if dimensions > 1:
            counts = found.setdefault(group_of(name, tied=tied), {})
            counts[kind.lower()] = counts.get(kind.lower(), 0) + 1
    order = (HEAD, EMBEDDING, *GROUPS, REST)
    return {group: dict(sorted(found[group].items())) for group in order if group in found}


def check_rows(mixture: Mixture, tensors: Iterable[tuple[str, int]]) -> None:
    """Refuse a head or group type whose blocks do not fit the rows; llama.cpp would take another type silently.

    Args:
        tensors: name and row length of every tensor of the model.

    Raises:
        RecipeError: the first matrix that cannot have its type, or a group that the model does not have.
    """
    known = list(tensors)
    tied = all(name != "output.weight" for name, _ in known)
    wanted = {**({HEAD: mixture.head} if mixture.head else {}), **parse_groups(mixture.groups)}
    for group, kind in wanted.items():
        rows = [(name, length) for name, length in known if group_of(name, tied=tied) == group]
        if not rows:
            raise RecipeError(f"{group}={kind}", "this model has no such tensors", "leave it out")
        block = TYPES[kind].block
        for name, length in rows:
            if length % block:
                fitting = ", ".join(other for other, entry in TYPES.items() if length % entry.block == 0)
                reason = f"{name} has rows of {length}, no multiple of its blocks of {block}"
                raise RecipeError(f"{group}={kind}", reason, f"types that fit: {fitting}")
