"""A session over plain onnxruntime 1.31, on a folder with a graph and its description.

The names of inputs, outputs and states come from the description (`genai_config.json`, or our `graph.json`) and from
the graph. The session owns the state (`onnx_states`): one KV buffer per attention layer where the graph extends it in
place, else two buffers that take turns. An adapter's matrices are graph inputs, bound like any other; without one the
graph's own defaults of rank zero apply. Shape legend: V vocabulary, T tokens, B = 1 conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import hash_json, sha256_file
from edgealign.errors import EdgealignError, InputError, ToolMissing, UsageError
from edgealign.runtimes.adapter_cache import AdapterCache, check_base
from edgealign.runtimes.onnx_adapter import load_onnxruntime, read_lora_onnx
from edgealign.runtimes.onnx_states import (
    TYPES,
    AppendedState,
    load_states,
    make_states,
    read_description,
    save_states,
)
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.session import Bundle, check_tokens, read_bundle
from edgealign.runtimes.snapshots import UserMark, pack, unpack
from edgealign.runtimes.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgealign.runtimes.session import Logits

    Array = npt.NDArray[Any]

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
MODEL_DIGEST = "edgealign.model_digest"  # in a model file, by the exporter
DEFAULT_CONTEXT = 4096
BATCH = 64  # tokens of a prompt fed at once: the graph makes logits for all, 16 MiB for a vocabulary of 65,536
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxSession:
    """One model, one state, one user at a time.

    Args:
        path: a bundle directory or its ``.onnx`` file.
        threads: None takes the cores this process may use.
        context: tokens the state can hold; None takes the model's own, at most ``DEFAULT_CONTEXT``.
        exact: quantised matrices meet activations in 32 bits; without it the graph says how, and ships with 8 bits.
        opened: the runtime's own session on this file, of a `twin`.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        context: int | None = None,
        exact: bool = False,
        check_digests: bool = True,
        opened: Any = None,
    ) -> None:
        path = Path(path)
        self.file = path if path.suffix == ".onnx" else read_bundle(path, check_digests=check_digests).model_file
        self.exact = exact
        self.threads = threads or default_threads()
        self._tokenizer = TokenizerFile(self.file.with_name(TOKENIZER))
        self._runtime = load_onnxruntime()
        self._config = read_description(self.file.parent)
        self._session = self._open() if opened is None else opened
        self._digest = str(self._session.get_modelmeta().custom_metadata_map.get(MODEL_DIGEST, ""))
        # The second kind has defaults: a LoRA's matrices.
        entries = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        self._inputs = {entry.name: entry for entry in entries}
        decoder = self._config["model"]["decoder"]
        self._ids = str(decoder["inputs"]["input_ids"])
        self._mask, self._positions = (decoder["inputs"].get(name, "") for name in ("attention_mask", "position_ids"))
        self._logits = str(decoder["outputs"]["logits"])
        self.vocab = int(self._config["model"]["vocab_size"])
        trained = int(self._config["model"]["context_length"])
        self.context = min(context or min(trained, DEFAULT_CONTEXT), trained)
        self._states = make_states(self.file, decoder, self._inputs, self.context)
        self._ones = np.ones((1, self.context), dtype=np.int64)
        self._places = np.arange(self.context, dtype=np.int64)[None]
        self._out_type = TYPES[next(out.type for out in self._session.get_outputs() if out.name == self._logits)]
        self._adapters = AdapterCache(self._read_adapter)
        self._bindings: list[Any] = []
        self._bind({})
        self._filled = self._touched = self._turn = 0
        self._user = UserMark()
        self._file_digest = ""

    def twin(self) -> OnnxSession:
        """Another state on the same opened model: the weights once, and one pool of threads.

        Two pools that wait for work in a loop take the cores from each other: a step of two cost 5.7 times one on two.
        """
        return OnnxSession(
            self.file, threads=self.threads, context=self.context, exact=self.exact, opened=self._session
        )  # fmt: skip

    def prefill(self, tokens: Sequence[int]) -> Logits:
        self._check_tokens(tokens)
        for start in range(0, len(tokens), BATCH):
            rows = self._run(tokens[start : start + BATCH])
        return np.array(rows[-1])

    def step(self, token: int) -> Logits:
        self._check_tokens((token,))
        return np.asarray(self._run((token,))[0])

    def score(self, tokens: Sequence[int]) -> Logits:
        """Logits (T, V) after each token, from an empty state; leaves the state empty."""
        self.reset()
        self._check_tokens(tokens)
        rows = [self._run(tokens[start : start + BATCH]) for start in range(0, len(tokens), BATCH)]
        self.reset()
        return np.concatenate(rows)

    def set_user(self, adapter: Path | None) -> None:
        self._bind({} if adapter is None else self._adapters.get(Path(adapter)))
        self._user.set(None if adapter is None else Path(adapter))
        self.reset()

    def reset(self) -> None:
        """Empty the state. Whatever was written is overwritten, so that nothing of a user stays behind."""
        for state in self._states:
            state.clear(self._touched)
        self._filled = self._touched = self._turn = 0

    def snapshot(self) -> bytes:
        if not self._filled:
            raise UsageError("state", "is empty: there is nothing to keep", "feed a prompt first")
        return pack(self._identity(), self._filled, save_states(self._states, self._turn, self._filled))

    def restore(self, state: bytes) -> None:
        self.reset()
        tokens, data = unpack(state, self._identity(), context=self.context)
        load_states(data, self._states, self._turn, tokens)
        self._filled = self._touched = tokens

    def _identity(self) -> dict[str, str]:
        if not self._file_digest:
            parts = sorted(self.file.parent.glob(f"{self.file.name}*"))  # the graph, and its weights beside it
            self._file_digest = hash_json([sha256_file(part) for part in parts])
        how = f"{self._cache_type()}, {'exact' if self.exact else 'as exported'}"
        return {
            "runtime": "onnxruntime", "version": str(self._runtime.__version__), "model": self._file_digest,
            "user": self._user.digest(), "cache": how,
        }  # fmt: skip

    def close(self) -> None:
        self._bindings.clear()
        self._adapters.clear()
        self._session = None

    def unload_adapters(self) -> None:
        """Forget every adapter, so that the next ``set_user`` reads its file; leaves the base model on."""
        self.set_user(None)
        self._adapters.clear()

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Token ids by the bundle's own tokenizer; no BOS is added. `special=False`: special tokens in it are text."""
        return self._tokenizer.encode(text, special)

    def info(self) -> dict[str, Any]:
        """Facts for parity and benchmarks; field names follow llama-bench where it has one."""
        model, template = self._config["model"], self.file.with_name(TEMPLATE)
        eos = model["eos_token_id"]
        return {
            "runtime": "onnxruntime",
            "version": str(self._runtime.__version__),
            "model_type": str(model["type"]),
            "model_size": Bundle(self.file.parent, "onnx", "", self.file, {}).model_bytes,
            "n_ctx": self.context,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "n_threads": self.threads,
            "type_k": self._cache_type(),
            "type_v": self._cache_type(),
            "vocab": self.vocab,
            "bos": int(model.get("bos_token_id") or 0),
            "eos": int(eos[0] if isinstance(eos, list) else eos),
            "chat_template": template.read_text(encoding="utf-8") if template.is_file() else None,
        }

    def _open(self) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # inputs with defaults are what we want; the warning about each is not
        try:
            model: str | bytes = str(self.file)
            if self.exact:
                options.add_session_config_entry(EXTERNAL_FOLDER, str(self.file.parent.resolve()))
                model = _exact_graph(self.file)
            return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except EdgealignError:
            raise
        except Exception as error:  # onnxruntime raises its own classes, which have no public base
            reason = f"onnxruntime {self._runtime.__version__} cannot open it ({_first_line(error)})"
            raise InputError(self.file, reason, "export it again: edgealign export --target onnx") from error

    def _bind(self, adapter: Mapping[str, Any]) -> None:
        """Two bindings: each step reads the convolutions' states from one buffer and writes the other."""
        if unknown := set(adapter) - set(self._inputs):
            raise InputError(min(unknown), "is an input of the adapter and none of the graph", "export them together")
        self._bindings = []
        for turn in (0, 1):
            binding = self._session.io_binding()
            for state in self._states:
                if not isinstance(state, AppendedState):  # its shape is another one in every run
                    past, present = state.buffers[turn], state.buffers[1 - turn]
                    _bind_array(binding.bind_input, state.past, past)
                    _bind_array(binding.bind_output, state.present, present)
            for name, value in adapter.items():
                binding.bind_ortvalue_input(name, value)
            self._bindings.append(binding)

    def _run(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the state; logits (T, V) after each."""
        count = len(tokens)
        binding = self._bindings[self._turn]
        ids = np.array([tokens], dtype=np.int64)
        logits = np.empty((1, count, self.vocab), dtype=self._out_type)
        _bind_array(binding.bind_input, self._ids, ids)
        if self._mask in self._inputs:
            _bind_array(binding.bind_input, self._mask, self._ones[:, : self._filled + count])
        if self._positions in self._inputs:
            _bind_array(binding.bind_input, self._positions, self._places[:, self._filled : self._filled + count])
        _bind_array(binding.bind_output, self._logits, logits)
        self._bind_appended(binding, self._filled + count)
        self._touched = self._filled + count
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            reason = f"onnxruntime failed ({_first_line(error)})"
            raise EdgealignError(self.file, reason, "open a new session") from error
        self._filled += count
        self._turn = 1 - self._turn
        return np.asarray(logits[0], dtype=np.float32)

    def _bind_appended(self, binding: Any, filled: int) -> None:
        """The caches that are longer after this run: read from one buffer, written to the other."""
        for state in self._states:
            if isinstance(state, AppendedState):
                past, present = state.buffers[self._turn], state.buffers[1 - self._turn]
                _bind_array(binding.bind_input, state.past, past, state.shape(self._filled))
                _bind_array(binding.bind_output, state.present, present, state.shape(filled))

    def _read_adapter(self, path: Path) -> Mapping[str, Any]:
        adapter = read_lora_onnx(path)
        check_base(path, adapter.base, self._digest, self.file)
        self._check_shapes(path, adapter.values)
        return adapter.values

    def _check_shapes(self, path: Path, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in self._inputs:
                raise InputError(path, f"holds {name}, for which the graph has no input", "export it for this model")
            wanted = self._inputs[name].shape
            if any(isinstance(size, int) and size != got for size, got in zip(wanted, value.shape(), strict=True)):
                reason = f"holds {name} as {value.shape()}, the graph's is {wanted}"
                raise InputError(path, reason, "export it for this model")

    def _cache_type(self) -> str:
        return "f16" if self._states[0].buffers[0].dtype == np.float16 else "f32"

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        fix = "shorten the conversation or open the session with a larger context"
        check_tokens(tokens, vocab=self.vocab, filled=self._filled, context=self.context, fix=fix)


def _exact_graph(file: Path) -> bytes:
    """The graph with every quantised matrix multiplied in 32 bits: exact, and for one token at a time 20 times slower.

    In 8 bits a token alone and the same token in a prompt differ by 0.07 standard deviations of the logits.
    """
    try:
        import onnx
    except ImportError as error:
        raise ToolMissing("onnx", "is needed for exact numbers", "pip install 'edgealign[onnx]'") from error
    model = onnx.load(str(file), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return bytes(model.SerializeToString())


def _bind_array(bind: Any, name: str, array: Array, shape: tuple[int, ...] | None = None) -> None:
    """Bind a numpy array by its address, as another shape if one is given; the caller keeps it alive."""
    bind(name, "cpu", 0, array.dtype.type, array.shape if shape is None else shape, array.ctypes.data)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
