"""A session over llama.cpp's C API, as llama-cpp-python 0.3.36 binds it (the low-level ctypes layer, not ``Llama``).

``Llama`` keeps an exact-prompt cache over adapter swaps, loads one adapter only and allocates per token. Here one
model has one context, a table of loaded adapters and one batch that is used again for every token, so that a step
costs ``llama_decode`` and one copy of the logits.

``exact=True`` is for parity: F32 cache and no flash attention. Without it the runtime's own defaults decide, which
is what ships and what is timed.

Source: llama.h, common/common.cpp. Shape legend: V vocabulary, T tokens.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import sha256_file
from edgealign.errors import EdgealignError, InputError, ToolMissing, UsageError
from edgealign.runtimes.adapter_cache import AdapterCache, check_base
from edgealign.runtimes.control_vector import find_control_vector, read_control_vector
from edgealign.runtimes.gguf_adapter import BASE_DIGEST
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.probe import DRIVEN_VERSION, default_threads, extra_buffers_work, install_line
from edgealign.runtimes.session import check_tokens, read_bundle
from edgealign.runtimes.snapshots import UserMark, pack, unpack

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits

# What this file drives; a build without one of these is another API.
NEEDED = (
    "llama_model_load_from_file", "llama_init_from_model", "llama_decode", "llama_get_logits_ith", "llama_get_memory",
    "llama_memory_clear", "llama_state_seq_get_data", "llama_state_seq_set_data", "llama_adapter_lora_init",
    "llama_set_adapters_lora", "llama_set_adapter_cvec", "llama_model_chat_template", "LLAMA_FLASH_ATTN_TYPE_DISABLED",
)  # fmt: skip
GGML_TYPE_F32 = 0
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
DEFAULT_CONTEXT = 4096
BATCH = 2048
SCORE_BATCH = 64  # tokens whose logits are held at once: 16 MiB for a vocabulary of 65,536
MODEL_DIGEST = "edgealign.model_digest"  # in a model file, by the exporter

_errors: collections.deque[str] = collections.deque(maxlen=8)


class LlamaSession:
    """One model, one context, one user at a time.

    Args:
        path: a bundle directory or a ``.gguf`` file.
        threads: for single tokens and for prompts; None takes the cores this process may use.
        context: tokens the state can hold; None takes the model's own, at most ``DEFAULT_CONTEXT``.
        exact: F32 cache, flash attention off.
        extra_bufts: llama.cpp's repacked weight buffers (AMX and friends); None asks the probe.
        sequences: conversations that the context has room for; this session itself holds the first (see `llama_pair`).
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        exact: bool = False,
        extra_bufts: bool | None = None,
        check_digests: bool = True,
        sequences: int = 1,
    ) -> None:
        path = Path(path)
        self.file = path if path.suffix == ".gguf" else read_bundle(path, check_digests=check_digests).model_file
        self._base_digest = check_gguf(self.file).metadata.get(MODEL_DIGEST)
        self._lib = lib = load_library()
        self.threads = threads or default_threads(self.file)
        self.exact = exact
        self.extra_bufts = extra_buffers_work() if extra_bufts is None else extra_bufts
        self._model: int | None = None
        self._context: int | None = None
        self._adapters = AdapterCache(self._read_adapter, self._free_adapter)
        self._open(context, sequences)
        self._memory = lib.llama_get_memory(self._context)
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self.vocab = int(lib.llama_vocab_n_tokens(self._vocabulary))
        self.context = min(int(lib.llama_n_ctx(self._context)) // sequences, self._wanted)
        self._batch_size = int(lib.llama_n_batch(self._context))
        self._filled = 0
        self._user = UserMark()
        self._file_digest = ""
        # One batch for the session's life. Null positions mean "after what is there", null logits "the last only".
        self._tokens: Any = (ctypes.c_int32 * self._batch_size)()
        self._batch = lib.llama_batch_get_one(self._tokens, 1)
        self._decode = lib.llama_decode
        # A second prototype of the same function that returns an address: a pointer object per step costs more.
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._logits_address = prototype(("llama_get_logits_ith", lib._lib))
        self._view_address = 0
        self._view: Logits = np.empty(0, dtype=np.float32)

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check_tokens(tokens)
        for start in range(0, len(tokens), self._batch_size):
            part = list(tokens[start : start + self._batch_size])
            self._tokens[: len(part)] = part
            self._batch.n_tokens = len(part)
            self._run(self._batch, len(part))
        return self._last_logits()

    def step(self, token: int) -> Logits:
        if not 0 <= token < self.vocab or self._filled >= self.context:
            self._check_tokens((token,))
        self._tokens[0] = token
        self._batch.n_tokens = 1
        self._run(self._batch, 1)
        return self._last_logits()

    def score(self, tokens: Sequence[int]) -> Logits:
        """Logits (T, V) after each token, from an empty state; leaves the state empty."""
        self.reset()
        self._check_tokens(tokens)
        rows = np.empty((len(tokens), self.vocab), dtype=np.float32)
        size = min(SCORE_BATCH, self._batch_size)
        batch = self._lib.llama_batch_get_one(self._tokens, 1)
        batch.logits = (ctypes.c_int8 * size)(*([1] * size))
        for start in range(0, len(tokens), size):
            part = list(tokens[start : start + size])
            self._tokens[: len(part)] = part
            batch.n_tokens = len(part)
            self._run(batch, len(part))
            for place in range(len(part)):
                rows[start + place] = self._logits(place)
        self.reset()
        return rows

    def set_user(self, adapter: Path | None) -> None:
        lib = self._lib
        vector = None if adapter is None else self._read_vector(Path(adapter))
        if adapter is None or vector is not None:
            status = lib.llama_set_adapters_lora(self._context, None, 0, None)
        else:
            handles = (lib.llama_adapter_lora_p_ctypes * 1)(self._adapters.get(Path(adapter)))
            status = lib.llama_set_adapters_lora(self._context, handles, 1, (ctypes.c_float * 1)(1.0))
        if vector is None:
            status = status or lib.llama_set_adapter_cvec(self._context, None, 0, 0, 0, 0)
        else:
            layers, width = vector.shape
            numbers = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))  # llama.cpp copies them
            status = status or lib.llama_set_adapter_cvec(self._context, numbers, vector.size, width, 1, layers)
        if status != 0:
            raise InputError(adapter or "base", f"llama.cpp cannot switch to it ({_reason()})", "export it again")
        # Also overwrite the memory itself: nothing of the user before stays behind.
        lib.llama_memory_clear(self._memory, True)
        self._filled = 0
        self._user.set(None if adapter is None else Path(adapter))

    def reset(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)
        self._filled = 0

    def snapshot(self) -> bytes:
        if not self._filled:
            raise UsageError("state", "is empty: there is nothing to keep", "feed a prompt first")
        size = int(self._lib.llama_state_seq_get_size(self._context, 0))
        buffer = (ctypes.c_uint8 * size)()
        written = int(self._lib.llama_state_seq_get_data(self._context, buffer, size, 0))
        if not written:
            raise EdgealignError(self.file, f"llama.cpp cannot give its state ({_reason()})", "feed the prompt again")
        return pack(self._identity(), self._filled, bytes(memoryview(buffer)[:written]))

    def restore(self, state: bytes) -> None:
        self.reset()
        tokens, data = unpack(state, self._identity(), context=self.context)
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if not self._lib.llama_state_seq_set_data(self._context, buffer, len(data), 0):
            self.reset()
            raise InputError("state", f"llama.cpp refuses it ({_reason()})", "feed the prompt again")
        self._filled = tokens

    def _identity(self) -> dict[str, str]:
        self._file_digest = self._file_digest or sha256_file(self.file)
        cache = "f32, flash attention off" if self.exact else "f16, flash attention auto"
        return {
            "runtime": "llama.cpp", "version": installed_version(), "model": self._file_digest,
            "user": self._user.digest(), "cache": cache,
        }

    def close(self) -> None:
        if self._context is not None:
            self._adapters.clear()
            self._lib.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._lib.llama_model_free(self._model)
            self._model = None

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids by llama.cpp's own tokenizer; no BOS is added. `special=False`: special tokens in it are text."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        tokens = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocabulary, raw, len(raw), tokens, room, False, special)
        if count < 0:
            raise EdgealignError(self.file, f"llama.cpp cannot tokenise {len(raw)} bytes", "report it")
        return list(tokens[:count])

    def info(self) -> dict[str, Any]:
        """Facts for parity and benchmarks; field names follow llama-bench where it has one."""
        lib, name = self._lib, ctypes.create_string_buffer(256)
        lib.llama_model_desc(self._model, name, len(name))
        template = lib.llama_model_chat_template(self._model, None)
        return {
            "runtime": "llama.cpp",
            "version": installed_version(),
            "model_type": name.value.decode("utf-8", "replace"),
            "model_size": int(lib.llama_model_size(self._model)),
            "model_n_params": int(lib.llama_model_n_params(self._model)),
            "n_ctx": self.context,
            "n_batch": self._batch_size,
            "n_ubatch": int(lib.llama_n_ubatch(self._context)),
            "n_threads": self.threads,
            "type_k": "f32" if self.exact else "f16",
            "type_v": "f32" if self.exact else "f16",
            "flash_attn": "off" if self.exact else "auto",
            "extra_bufts": self.extra_bufts,
            "system_info": lib.llama_print_system_info().decode().strip(" |"),
            "vocab": self.vocab,
            "bos": int(lib.llama_vocab_bos(self._vocabulary)),
            "eos": int(lib.llama_vocab_eos(self._vocabulary)),
            "chat_template": None if template is None else template.decode("utf-8"),
        }

    def unload_adapters(self) -> None:
        """Free every adapter, so that the next ``set_user`` reads its file; leaves the base model on."""
        self.set_user(None)
        self._adapters.clear()

    def _open(self, context: int | None, sequences: int) -> None:
        lib = self._lib
        _errors.clear()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = self.extra_bufts
        self._model = lib.llama_model_load_from_file(os.fsencode(self.file), params)
        if not self._model:
            raise InputError(self.file, f"llama.cpp cannot load it ({_reason()})", "export it again")
        trained = int(lib.llama_model_n_ctx_train(self._model))
        settings = lib.llama_context_default_params()
        self._wanted = context or min(trained, DEFAULT_CONTEXT)
        settings.n_ctx = self._wanted * sequences  # llama.cpp divides it among them
        settings.n_seq_max = sequences
        settings.n_batch = min(BATCH, self._wanted)
        settings.n_ubatch = min(settings.n_ubatch, settings.n_batch)
        settings.n_outputs_max = SCORE_BATCH
        settings.n_outputs_max_per_seq = 0
        settings.n_threads = settings.n_threads_batch = self.threads
        if self.exact:
            settings.type_k = settings.type_v = GGML_TYPE_F32
            settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise InputError(
                self.file, f"llama.cpp cannot make a context of {settings.n_ctx} tokens ({_reason()})", "use less"
            )

    def _read_vector(self, path: Path) -> npt.NDArray[np.float32] | None:
        """(L - 1, D) of a control vector, None where the file is something else."""
        file = find_control_vector(path)
        if file is None:
            return None
        layers = int(self._lib.llama_model_n_layer(self._model))
        found = read_control_vector(file, layers=layers, width=int(self._lib.llama_model_n_embd(self._model)))
        check_base(path, found.base_digest, str(self._base_digest or ""), self.file)
        return found.rows(layers)

    def _read_adapter(self, path: Path) -> Any:
        self._check_adapter(path)
        _errors.clear()
        handle = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not handle:  # setting a null adapter would crash
            raise InputError(
                path, f"llama.cpp refuses it for {self.file.name} ({_reason()})", "export it for this model"
            )
        return handle

    def _free_adapter(self, handle: Any) -> None:
        self._lib.llama_set_adapters_lora(self._context, None, 0, None)
        self._lib.llama_adapter_lora_free(handle)

    def _check_adapter(self, path: Path) -> None:
        """Refuse what llama.cpp takes without looking (another base) or answers with an abort (tied embeddings)."""
        header = check_gguf(path)
        if not header.is_adapter:
            raise InputError(path, "is a GGUF file, but no adapter", "export the user's adapter to GGUF first")
        check_base(path, str(header.metadata.get(BASE_DIGEST) or ""), str(self._base_digest or ""), self.file)
        for tensor in header.tensors:
            if tensor.name.startswith(("token_embd.", "output.")):
                target = tensor.name.split(".weight")[0]
                raise InputError(path, f"adapts {target}, which kills llama.cpp", "merge that adapter instead")

    def _run(self, batch: Any, count: int) -> None:
        status = self._decode(self._context, batch)
        if status != 0:
            raise EdgealignError(self.file, f"llama_decode returned {status} ({_reason()})", "open a new session")
        self._filled += count

    def _last_logits(self) -> Logits:
        return self._logits(-1).copy()

    def _logits(self, place: int) -> Logits:
        """A view (V,) of llama.cpp's own buffer: valid until the next decode."""
        address = self._logits_address(self._context, place)
        if not address:
            raise EdgealignError(self.file, "llama.cpp has no logits at this position", "open a new session")
        if address != self._view_address:
            buffer: Any = (ctypes.c_float * self.vocab).from_address(address)
            self._view, self._view_address = np.frombuffer(buffer, dtype=np.float32), address
        return self._view

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        fix = "shorten the conversation or open the session with a larger context"
        check_tokens(tokens, vocab=self.vocab, filled=self._filled, context=self.context, fix=fix)


@functools.cache
def load_library() -> Any:
    """The bindings, silenced and initialised once.

    Raises:
        ToolMissing: llama-cpp-python is absent, or is another API than this file drives.
    """
    try:
        lib = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError as error:
        raise ToolMissing("llama-cpp-python", "is not installed", f"install it with: {install_line()}") from error
    except (OSError, RuntimeError) as error:
        raise ToolMissing("llama-cpp-python", f"cannot be loaded ({error})", f"build it: {install_line()}") from error
    fields = {name for name, _ in lib.llama_model_params._fields_ + lib.llama_context_params._fields_}
    lacking = [name for name in NEEDED if not hasattr(lib, name)]
    lacking += sorted({"use_extra_bufts", "flash_attn_type", "n_outputs_max"} - fields)
    if lacking:
        raise ToolMissing(
            f"llama-cpp-python {installed_version()}",
            f"lacks {lacking[0]}, which edgealign calls (it drives {DRIVEN_VERSION})",
            f"install it with: {install_line()}",
        )
    lib.llama_log_set(_keep_errors(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


def installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _keep_errors(lib: Any) -> Any:
    """llama.cpp talks on stderr about every tensor; only its last errors are kept, for our messages."""

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL and (line := text.decode("utf-8", "replace").strip()):
            _errors.append(line)

    return lib.llama_log_callback(keep)


def _reason() -> str:
    """The first error since the last one was told: those after it only say that the caller failed, too."""
    first = _errors[0] if _errors else "no reason given"
    _errors.clear()
    return re.sub(r"^(\w+: )?((error loading model|failed to apply lora adapter): )?", "", first)
