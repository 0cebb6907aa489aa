"""Reward heads on frozen features: one interface for all the ways to learn a user from a few choices.

    head = HEADS.load("gpm").learn(seen)               # the shared part, from many users' choices
    state = head.fit(own)                              # a new user: some numbers, 4 bytes each on disk
    margins = head.margins(state, pairs)               # (N,) log-odds that the first answer is the chosen one

A head is a frozen dataclass of arrays, whose shapes are declared by letters (`Annotated[Floats, "F B"]`), and of
positive numbers. That is all `save_head` and `load_head` need to know: `head.safetensors` beside `head.json`, and no
code in either.

Shape legend: N pairs, F features, P prompt features, S numbers of a user.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from edgealign.artifact import write_atomic
from edgealign.errors import InputError, RecipeError, UsageError, writing
from edgealign.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float64]
State = npt.NDArray[np.float32]
H = TypeVar("H", bound="Head")

HEADS = Registry(
    "reward head",
    {
        "lore": "edgealign.personalize.lore_head:Lore",
        "lore-released": "edgealign.personalize.lore_head:LoreReleased",
        "np-btl": "edgealign.personalize.neural_process:NeuralProcess",
        "pal-a": "edgealign.personalize.ideal_points:PalA",
        "pal-b": "edgealign.personalize.ideal_points:PalB",
        "micro": "edgealign.personalize.mixture:Mixture",
        "gpm": "edgealign.personalize.general:General",
        "mrm": "edgealign.personalize.meta:Meta",
        "maxmin": "edgealign.personalize.max_min:MaxMin",
    },
)
WEIGHTS, DESCRIPTION, VERSION = "head.safetensors", "head.json", 1
DESCRIPTION_LIMIT = 1 << 20
AGAIN = "get or learn the head again"
MAY_BE_EMPTY = "P"  # a head that was learned without prompts has nothing to read them with
HELD_OUT_USERS = 0.2
CONTEXTS = (1, 4, 16)  # numbers of choices that a head's settings are chosen for


@dataclass(frozen=True)
class Choices:
    """Pairs of answers, the chosen one first, as frozen features.

    Raises:
        UsageError: shapes that do not belong together, or numbers that are not finite.
    """

    chosen: Floats  # (N, F)
    rejected: Floats  # (N, F)
    users: npt.NDArray[np.int64]  # (N,) who chose
    prompts: Floats | None = None  # (N, P)

    def __post_init__(self) -> None:
        rows, said = len(self.chosen), f"{self.chosen.shape} chosen, {self.rejected.shape} rejected"
        both = self.chosen.ndim == 2 and self.chosen.shape == self.rejected.shape
        if not both or self.users.shape != (rows,):
            raise UsageError(said, f"are no pairs of {len(self.users)} users' choices", "give (N, F), (N, F) and (N,)")
        if self.prompts is not None and (self.prompts.ndim != 2 or len(self.prompts) != rows):
            raise UsageError(said, f"do not belong to prompts of {self.prompts.shape}", "give (N, P), a prompt a pair")
        for values in (self.chosen, self.rejected, self.prompts):
            if values is not None and not np.isfinite(values).all():
                raise UsageError(said, "hold numbers that are not finite", "look at the features")

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def gaps(self) -> Floats:
        """(N, F)"""
        return self.chosen - self.rejected

    def take(self, rows: Any) -> Choices:
        """Some of the pairs: whatever indexes an array."""
        prompts = None if self.prompts is None else self.prompts[rows]
        return Choices(self.chosen[rows], self.rejected[rows], self.users[rows], prompts)

    def by_user(self) -> Iterator[Choices]:
        """Each user's own, in the order of their numbers."""
        for user in np.unique(self.users):
            yield self.take(self.users == user)

    def turned(self, rows: npt.NDArray[np.bool_]) -> Choices:
        """With the labels of these pairs flipped."""
        swap = rows[:, None]
        chosen, rejected = np.where(swap, self.rejected, self.chosen), np.where(swap, self.chosen, self.rejected)
        return Choices(chosen, rejected, self.users, self.prompts)

    def scaled(self, scale: Floats) -> tuple[Tensor, Tensor]:
        """Both sides, divided by the features' deviations.

        Raises:
            UsageError: not as many features as the head was learned on.
        """
        import torch

        if self.chosen.shape[1] != len(scale):
            reason = f"are not the {len(scale)} that the head was learned on"
            raise UsageError(f"{self.chosen.shape[1]} features", reason, "read them from the model of the head")
        return torch.from_numpy(self.chosen / scale), torch.from_numpy(self.rejected / scale)


class Head(Protocol):
    """The shared part of a method, learned from seen users."""

    name: ClassVar[str]

    @property
    def state_size(self) -> int: ...

    def fit(self, choices: Choices) -> State:
        """(S,) of a new user; without choices, of nobody in particular."""
        ...

    def margins(self, state: State, pairs: Choices) -> Floats:
        """(N,) log-odds that this user chooses the first answer of each pair."""
        ...


def shapes_of(head: type[Any]) -> dict[str, list[str]]:
    """The arrays of a head's class; equal letters are equal sizes."""
    hints = get_type_hints(head, include_extras=True)
    return {name: hint.__metadata__[0].split() for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def learn_calibrated(
    learn: Callable[[Choices], H], choices: Choices, name: str, values: Sequence[float], seed: int
) -> H:
    """A head from all users, with the value of one setting that served users best whom it was not learned from.

    A head fits the users whom it is learned from better than it will fit others; how far a new user may go with k
    choices can only be seen on users who were held out.
    """
    people = np.unique(choices.users)
    count = round(HELD_OUT_USERS * len(people))
    if not count or count == len(people):
        return learn(choices)
    away = np.isin(choices.users, np.random.default_rng(seed).permutation(people)[:count])
    head, held_out = learn(choices.take(~away)), list(choices.take(away).by_user())
    trials = [dataclasses.replace(head, **{name: value}) for value in values]  # type: ignore[type-var]
    best = int(np.argmin([few_shot_loss(trial, held_out) for trial in trials]))
    return dataclasses.replace(learn(choices), **{name: values[best]})  # type: ignore[type-var]


def few_shot_loss(head: Head, people: Sequence[Choices]) -> float:
    """Mean negative log-likelihood, in nats, of the second half of each user's choices after some of the first."""
    losses = []
    for own in people:
        half = len(own) // 2
        targets = own.take(slice(half, None))
        for count in sorted({min(context, half) for context in CONTEXTS}):
            margins = head.margins(head.fit(own.take(slice(count))), targets)
            losses.append(float(np.logaddexp(0, -margins).mean()))
    return float(np.mean(losses))


def minimise(parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int) -> list[Tensor]:
    """L-BFGS on all the data at once: no rate to choose, and the same numbers every time."""
    import torch

    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(list(parameters), max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [parameter.detach() for parameter in parameters]


def pack_state(state: State) -> bytes:
    """What a user is on disk."""
    return state.astype("<f4").tobytes()


def unpack_state(head: Head, data: bytes) -> State:
    """A user from disk.

    Raises:
        InputError: not a user of this head.
    """
    if len(data) != 4 * head.state_size:
        need = f"is not a user of {head.name}, which needs {4 * head.state_size}"
        raise InputError(f"{len(data)} bytes", need, "fit the user again")
    state = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(state).all():
        raise InputError(f"{len(data)} bytes", "hold numbers that are not finite", "fit the user again")
    return state


def save_head(head: Head, folder: Path) -> None:
    """Write the shared part into a directory; the description comes last, without it there is no head.

    Raises:
        OutputError: it cannot be written there.
    """
    from safetensors.numpy import save_file

    shapes = shapes_of(type(head))
    arrays = {name: np.ascontiguousarray(getattr(head, name)) for name in shapes}
    names = [field.name for field in dataclasses.fields(head)]  # type: ignore[arg-type]
    settings = {name: getattr(head, name) for name in names if name not in shapes}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        save_file(arrays, folder / WEIGHTS)
        write_atomic(folder / DESCRIPTION, json.dumps({"version": VERSION, "head": head.name, "settings": settings}))


def load_head(folder: Path) -> Head:
    """Read a head back, and prove that its parts fit together.

    Raises:
        InputError: a file is missing, truncated, foreign or damaged, in one line.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from edgealign.models.load import check_safetensors

    settings, made = _read_description(folder / DESCRIPTION)
    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(file, "is not there", AGAIN)
    shapes = {name: entry["shape"] for name, entry in check_safetensors(file).items()}
    fields = shapes_of(made)
    if set(shapes) != set(fields):
        raise InputError(file, f"does not hold the arrays of a {made.name} head ({', '.join(fields)})", AGAIN)
    sizes: dict[str, int] = {}
    for name, letters in fields.items():
        fits = len(shapes[name]) == len(letters) and all(
            sizes.setdefault(letter, size) == size and (size > 0 or letter == MAY_BE_EMPTY)
            for letter, size in zip(letters, shapes[name], strict=True)
        )
        if not fits:
            raise InputError(file, f"{name} has the shape {shapes[name]}, not ({', '.join(letters)})", AGAIN)
    try:
        arrays = load_file(file)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise InputError(file, f"cannot be read ({error})", AGAIN) from error
    for name, values in arrays.items():
        if values.dtype not in (np.float32, np.float64) or not np.isfinite(values).all():
            raise InputError(file, f"{name} does not hold finite floating-point numbers", AGAIN)
        if name == "scale" and not (values > 0).all():  # features are divided by it
            raise InputError(file, "scale is not positive everywhere", AGAIN)
    head: Head = made(**arrays, **settings)
    return head


def _read_description(file: Path) -> tuple[dict[str, Any], Any]:
    """Settings, and the class of the head."""
    try:
        if file.stat().st_size > DESCRIPTION_LIMIT:
            raise InputError(file, "is too large for a head's description", AGAIN)
        found = json.loads(file.read_text(encoding="utf-8"))
        version, name, settings = found["version"], found["head"], dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(file, f"is not a head's description ({type(error).__name__})", AGAIN) from error
    if version != VERSION:
        raise InputError(file, f"has version {version!r}, {VERSION} is read here", AGAIN)
    try:
        made = HEADS.load(name) if isinstance(name, str) else None
    except RecipeError as error:
        raise InputError(file, f"{name} {error.reason}", AGAIN) from error
    wanted = {field.name for field in dataclasses.fields(made)} - set(shapes_of(made)) if made else set()
    if made is None or set(settings) != wanted:
        raise InputError(file, f"does not describe a head: {name!r} has the settings {sorted(wanted)}", AGAIN)
    for key, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise InputError(file, f"{key} is {value!r}, not a positive number", AGAIN)
    return settings, made

