"""A session over ExecuTorch 1.5's own runtime, on a program that `export/to_executorch.py` made.

Where the state is, `executorch_states` knows. A program of ExecuTorch's own definition holds it: position 0 begins a
conversation, the convolutions' state counts for nothing there, and attention reads no further back than that. What an
earlier conversation left in such a KV cache stays in this process's memory until it is overwritten; closing the session
frees it. A user's matrices are inputs of `adapted`.

ExecuTorch has one pool of threads for the whole process: a session that asks for another number changes it for all.

Shape legend: V vocabulary, T tokens.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import MANIFEST, open_artifact
from edgealign.errors import EdgealignError, InputError, ToolMissing
from edgealign.runtimes.adapter_cache import AdapterCache, check_base
from edgealign.runtimes.executorch_adapter import SMALLEST_RANK, read_lora_executorch
from edgealign.runtimes.executorch_names import ADAPTED, FORWARD
from edgealign.runtimes.executorch_states import EXPORT, open_states
from edgealign.runtimes.lora_inputs import read_inputs
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.session import check_tokens, read_bundle
from edgealign.runtimes.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
MAGIC = b"ET"  # bytes 4 and 5 of a program: its flatbuffer's identifier is ET and a version


class ExecutorchSession:
    """One program, one state, one user at a time.

    Args:
        path: a bundle directory or its ``.pte`` file.
        threads: None takes the cores this process may use.
        context: tokens the state may hold; None and anything longer take the program's own, which is fixed.
        exact: for other runtimes; a program rounds activations as it was exported to.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        exact: bool = False,
        check_digests: bool = True,
    ) -> None:
        path = Path(path)
        self.file = path if path.suffix == ".pte" else read_bundle(path, check_digests=check_digests).model_file
        self.exact = exact
        self.threads = threads or default_threads()
        self._tokenizer = TokenizerFile(self.file.with_name(TOKENIZER))
        self._runtime = _load_runtime(self.threads)
        self._program = self._open()
        planned = int(self._ask("get_max_context_len"))
        self.vocab = int(self._ask("get_vocab_size"))
        self.batch = int(self._ask("get_max_seq_len")) - 1
        self.context = min(context or planned, planned)
        self._digest = str(self._ask("get_model_digest"))
        self._inputs = read_inputs(self.file.parent)
        self._methods: dict[str, Any] = {}
        self._adapters = AdapterCache(self._read_adapter)
        self._matrices: tuple[Any, ...] = ()
        self._method = self._load(FORWARD)
        self._states = open_states(self.file, self._method, context=planned)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._require(tokens)
        for start in range(0, len(tokens), self.batch):
            logits = self._run(tokens[start : start + self.batch])
        return logits

    def step(self, token: int) -> Logits:
        self._require((token,))
        return self._run((token,))

    def set_user(self, adapter: Path | None) -> None:
        self._matrices = () if adapter is None else self._adapters.get(Path(adapter))
        self._method = self._load(FORWARD if adapter is None else ADAPTED)
        self.reset()

    def reset(self) -> None:
        self._states.clear()

    def close(self) -> None:
        self._matrices = ()
        self._adapters.clear()
        self._methods.clear()
        self._states.clear()
        self._method = self._program = None

    def unload_adapters(self) -> None:
        """Forget every adapter, so that the next ``set_user`` reads its file; leaves the base model on."""
        self.set_user(None)
        self._adapters.clear()

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids by the bundle's own tokenizer; no BOS is added. `special=False`: special tokens in it are text."""
        return self._tokenizer.encode(text, special)

    def info(self) -> dict[str, Any]:
        """Facts for parity and benchmarks; field names follow llama-bench where it has one."""
        template = self.file.with_name(TEMPLATE)
        manifest = self.file.with_name(MANIFEST)
        facts = open_artifact(self.file.parent, check_digests=False).meta if manifest.is_file() else {}
        return {
            "runtime": "executorch",
            "version": _version(),
            "model_type": facts.get("architecture"),
            "model_n_params": facts.get("parameters"),
            "model_size": self.file.stat().st_size,
            "n_ctx": self.context,
            "n_batch": self.batch,
            "n_ubatch": self.batch,
            "n_threads": self.threads,
            "type_k": "f32",
            "type_v": "f32",
            "vocab": self.vocab,
            "bos": int(self._ask("get_bos_id")),
            "eos": int(self._ask("get_eos_ids")),
            "chat_template": template.read_text(encoding="utf-8") if template.is_file() else None,
        }

    def _open(self) -> Any:
        """The program, read and checked but not loaded.

        The runtime checks a file's structure and says so on the terminal; a foreign file is told apart before that.
        """
        if not self.file.is_file():
            raise InputError(self.file, "no such program", EXPORT)
        with self.file.open("rb") as opened:
            head = opened.read(8)
        if head[4:6] != MAGIC:
            raise InputError(self.file, "is no ExecuTorch program", EXPORT)
        try:
            with _hushed():
                return self._runtime.load_program(self.file)
        except Exception as error:  # executorch raises RuntimeError with a code
            raise InputError(self.file, f"executorch {_version()} cannot open it ({_line(error)})", EXPORT) from error

    def _ask(self, name: str) -> Any:
        """A fact that the exporter wrote into the program."""
        if name not in self._program.method_names:
            raise InputError(self.file, f"does not say its {name.removeprefix('get_')}: not made here", EXPORT)
        return self._program.load_method(name).execute(())[0]

    def _load(self, name: str) -> Any:
        """A method with its weights packed, which takes a second for a large model: loaded once, when it is needed."""
        if name not in self._methods:
            try:
                self._methods[name] = self._program.load_method(name)
            except Exception as error:  # as above
                raise InputError(self.file, f"its method {name} cannot be loaded ({_line(error)})", EXPORT) from error
        return self._methods[name]

    def _run(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the state; logits (V,) after the last."""
        try:
            out = self._method.execute((*self._states.inputs(tokens), *self._matrices))
        except Exception as error:  # as above
            raise EdgealignError(self.file, f"executorch failed ({_line(error)})", "open a new session") from error
        self._states.advance(tokens, out)
        return np.array(out[0].numpy().reshape(-1), dtype=np.float32)

    def _read_adapter(self, path: Path) -> tuple[Any, ...]:
        adapter = read_lora_executorch(path)
        check_base(path, adapter.base_digest or "", self._digest, self.file)
        return self._arrange(path, adapter.values, max(adapter.rank, SMALLEST_RANK))

    def _arrange(self, path: Path, values: Any, rank: int) -> tuple[Any, ...]:
        """The matrices in the order of the method's inputs; zeros for what the user has not adapted."""
        torch = _torch()
        left = set(values)
        arranged = []
        for entry in self._inputs:
            for name, shape in ((entry.a, (1, entry.columns, rank)), (entry.b, (1, rank, entry.out))):
                value = values.get(name)
                if value is not None and value.shape != shape:
                    reason = f"holds {name} as {list(value.shape)}, the program's is {list(shape)}"
                    raise InputError(path, reason, "export it for this model")
                left.discard(name)
                arranged.append(torch.zeros(shape) if value is None else torch.from_numpy(value).float().contiguous())
        if left:
            raise InputError(path, f"holds {min(left)}, for which the program has no input", "export it for this model")
        return tuple(arranged)

    def _require(self, tokens: Sequence[int]) -> None:
        fix = "shorten the conversation, or export the model with a larger context"
        check_tokens(tokens, vocab=self.vocab, filled=self._states.filled, context=self.context, fix=fix)


def _load_runtime(threads: int) -> Any:
    """ExecuTorch's runtime with its kernels for language models; the order of the imports matters to it."""
    try:
        with _hushed():
            from executorch.runtime import Runtime  # noqa: I001
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            import executorch.kernels.quantized  # noqa: F401
    except ImportError as error:
        reason = "is not installed" if "executorch" in str(error) else f"cannot be loaded ({error})"
        raise ToolMissing("executorch", reason, "pip install 'edgealign[executorch]'") from error
    with _hushed():
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
        return Runtime.get()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Its libraries print on file descriptor 2 while they load, which no logging level stops; and they warn."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _torch() -> Any:
    import torch

    return torch


def _version() -> str:
    from importlib.metadata import version

    return version("executorch")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
