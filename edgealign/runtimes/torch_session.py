"""The oracle: the model in torch, in 32-bit floats, with PEFT LoRA directories and control vectors as users.

An adapter counts only if every one of its tensors found its place: PEFT skips keys that match nothing, and an adapter
that is half attached is a reference for nothing.

Shape legend: B = 1 conversation, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import MANIFEST, Artifact, open_model
from edgealign.errors import InputError, ToolMissing, UsageError
from edgealign.models.load import load_model
from edgealign.personalize.adapter import check_adapter_base
from edgealign.runtimes.adapter_cache import check_base
from edgealign.runtimes.control_vector import find_control_vector, read_control_vector, steer
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.snapshots import UserMark, pack, unpack
from edgealign.runtimes.torch_rows import TorchRows

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

WEIGHTS = "adapter_model.safetensors"
KEPT_ADAPTERS = 16


class TorchSession:
    """One model and its cache; ``prefill`` and ``step`` continue it, ``score`` empties it, ``snapshot`` keeps it."""

    def __init__(self, path: Path, *, threads: int | None = None, dtype: str = "float32") -> None:
        import torch

        # torch's own number knows physical cores and OMP_NUM_THREADS, but no container's quota
        torch.set_num_threads(threads or min(torch.get_num_threads(), default_threads()))
        self.path = Path(path)
        self._torch = torch
        self._model: Any = load_model(path, dtype=dtype)
        self._peft: Any = None
        self._artifact: Artifact | None = None
        self._adapters: OrderedDict[tuple[str, int, int], str] = OrderedDict()
        self._loaded = 0
        self._cache: Any = None
        self._hooks: list[Any] = []
        self._user = UserMark()
        self.dtype = dtype
        self.vocab = int(self._model.config.get_text_config().vocab_size)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        # Continuing a cache with several tokens at once is exact for LFM2 in transformers 5.23, also with pieces
        # shorter than the convolution's width: 15 ways to cut 40 tokens agreed with one pass to 1e-5 on logits with a
        # standard deviation of 1.6. test_torch_session.py repeats it.
        output = self._forward(tokens, use_cache=True, past_key_values=self._cache, logits_to_keep=1)
        self._cache = output.past_key_values
        return self._numpy(output.logits[0, -1])

    def step(self, token: int) -> Logits:
        return self.prefill((token,))

    def score(self, tokens: Sequence[int]) -> Logits:
        """Logits (T, V) after each token of one pass without a cache; leaves the state empty."""
        self.reset()
        return self._numpy(self._forward(tokens, use_cache=False).logits[0])

    def rows(self, prompts: Sequence[Sequence[int]]) -> TorchRows:
        """The prompts side by side, apart from the session's own state."""
        for prompt in prompts:
            self._check(prompt)
        return TorchRows(self._model, prompts)

    def set_user(self, adapter: Path | None) -> None:
        self.reset()
        while self._hooks:
            self._hooks.pop().remove()
        vector = None if adapter is None else find_control_vector(Path(adapter))
        if adapter is None or vector is not None:
            self._user.set(None)
            if self._peft is not None:
                self._peft.base_model.disable_adapter_layers()
            if vector is not None:
                self._steer(vector)
                self._user.set(vector)
            return
        name = self._attach(Path(adapter))
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(name)
        self._user.set(Path(adapter))

    def merge_user(self) -> None:
        """Add the active adapter into the weights, for good: for a last comparison, nothing can follow it."""
        assert self._peft is not None, "no adapter is attached"
        self._model = self._peft.merge_and_unload()
        self._peft = None
        self._adapters.clear()
        self.reset()

    def weights(self) -> dict[str, Any]:
        """The model's own parameters by the names that its files use, whether or not adapters are attached."""
        named = self._model.named_parameters()
        return {name.replace(".base_layer.", "."): value for name, value in named if ".lora_" not in name}

    def reset(self) -> None:
        self._cache = None

    def snapshot(self) -> bytes:
        from edgealign.runtimes.torch_states import save_cache

        if self._cache is None:
            raise UsageError("state", "is empty: there is nothing to keep", "feed a prompt first")
        return pack(self._identity(), int(self._cache.get_seq_length()), save_cache(self._cache))

    def restore(self, state: bytes) -> None:
        from edgealign.runtimes.torch_states import load_cache

        self.reset()
        _, tensors = unpack(state, self._identity())
        self._cache = load_cache(tensors, self._model.config)

    def _identity(self) -> dict[str, str]:
        import transformers

        self._artifact = self._artifact or open_model(self.path)
        version = f"torch {self._torch.__version__}, transformers {transformers.__version__}"
        return {
            "runtime": "torch", "version": version, "model": self._artifact.digest, "user": self._user.digest(),
            "cache": self.dtype,
        }

    def close(self) -> None:
        self._model = self._peft = self._cache = None
        self._adapters.clear()

    def info(self) -> dict[str, Any]:
        return {
            "runtime": "torch",
            "version": str(self._torch.__version__),
            "model_type": str(self._model.config.model_type),
            "model_n_params": sum(parameter.numel() for parameter in self._model.parameters()),
            "n_threads": self._torch.get_num_threads(),
            "dtype": self.dtype,
            "vocab": self.vocab,
        }

    def _forward(self, tokens: Sequence[int], **options: Any) -> Any:
        self._check(tokens)
        with self._torch.inference_mode():
            return self._model(input_ids=self._torch.tensor([list(tokens)]), **options)

    def _check(self, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise UsageError("prompt", "is empty", "give at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocab:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab)
            raise UsageError(wrong, f"is outside the vocabulary of {self.vocab}", "encode with this tokenizer")

    def _numpy(self, values: Any) -> Logits:
        return np.array(values.to(self._torch.float32).numpy(), dtype=np.float32)

    def _steer(self, path: Path) -> None:
        config = self._model.config.get_text_config()
        vector = read_control_vector(path, layers=int(config.num_hidden_layers), width=int(config.hidden_size))
        self._artifact = self._artifact or open_model(self.path)
        check_base(path, vector.base_digest, self._artifact.digest, self.path)
        self._hooks = steer(self._model, vector.directions)

    def _attach(self, path: Path) -> str:
        try:
            stat = (path / WEIGHTS).stat()
        except OSError as error:
            raise InputError(path, f"holds no {WEIGHTS}", "give a LoRA in PEFT layout") from error
        key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        if key in self._adapters:
            self._adapters.move_to_end(key)
            return self._adapters[key]
        self._check_base(path)
        name = f"user{self._loaded}"
        self._load(path, name)
        self._loaded += 1
        self._adapters[key] = name
        if len(self._adapters) > KEPT_ADAPTERS:
            self._peft.delete_adapter(self._adapters.popitem(last=False)[1])
        return name

    def _check_base(self, path: Path) -> None:
        if (path / MANIFEST).is_file():
            self._artifact = self._artifact or open_model(self.path)
            check_adapter_base(path, self._artifact)

    def _load(self, path: Path, name: str) -> None:
        try:
            from peft import PeftModel, get_peft_model_state_dict
        except ModuleNotFoundError as error:
            raise ToolMissing("peft", "is not installed", "install it with: pip install peft") from error
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path / WEIGHTS, framework="pt") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns of what is an error below
                given = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self._model, str(path), adapter_name=name)
                else:
                    self._peft.load_adapter(str(path), adapter_name=name)
        except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            self._detach(name)
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(path, f"does not fit this model ({reason})", "fit it on this model") from error
        self._peft.eval()
        # Without save_embedding_layers PEFT would ask the hub for the base's configuration.
        state = get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)
        attached = {key: tuple(value.shape) for key, value in state.items()}
        if given != attached:
            odd = sorted(given.items() ^ attached.items())[0][0]
            self._detach(name)
            raise InputError(
                path, f"matches this model only in part: {len(given)} tensors there, {len(attached)} here, first "
                f"difference {odd}", "fit it on this model",
            )  # fmt: skip

    def _detach(self, name: str) -> None:
        """Undo an attachment that failed halfway."""
        if self._peft is None or not self._adapters:
            # The first adapter changes the module tree itself: only a fresh model is surely clean.
            self._peft = None
            self._model = load_model(self.path, dtype=self.dtype)
        elif name in self._peft.peft_config:
            self._peft.delete_adapter(name)
