"""Shared fixtures: one tiny LFM2 directory and LoRA adapters for it, per test run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker has about a core

TinyLora = Callable[..., Path]
SUPPORT = Path(__file__).resolve().parents[1] / "export" / "support.json"
PROVED = pytest.StashKey[set[tuple[str, str, str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support", choices=("check", "write"),
        help="compare export/support.json with what this run exported and verified, or write it (whole runs only)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PROVED] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest one first: at the end one process would wait for it."""
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What a passing test has exported and published counts as supported: its gate has passed."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.when == "call" and report.passed and folder is not None:
        for manifest in folder.glob("**/manifest.json"):
            item.config.stash[PROVED].update(_proved(manifest))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of a run in several processes is through: what it proved counts."""
    node.config.stash[PROVED].update(map(tuple, getattr(node, "workeroutput", {}).get("proved", ())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["proved"] = sorted(session.config.stash[PROVED])
        return
    wanted = session.config.getoption("--support")
    if wanted is None:
        return
    proved = sorted(session.config.stash[PROVED])
    if wanted == "write":
        lines = ",\n".join(f" {json.dumps(cell)}" for cell in proved)
        SUPPORT.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return
    stated = {tuple(cell) for cell in json.loads(SUPPORT.read_text(encoding="utf-8"))}
    for cell in sorted(stated ^ set(proved)):
        what = "is promised, and this run did not prove it" if cell in stated else "was proved, and is not written down"
        print(f"\nsupport matrix: {' '.join(cell)} {what}: pytest --support write; export/support_matrix.py --write")
    if stated - set(proved) and os.environ.get("CI", "").lower() == "true":  # elsewhere a runtime may be missing
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _proved(file: Path) -> set[tuple[str, str, str, str]]:
    """(target, quantisation, architecture, carrier) of a published bundle; architectures by transformers' names."""
    from edgealign.runtimes.gguf_names import ARCHITECTURES

    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        meta = manifest["meta"]
        if (manifest["kind"], manifest["stage"]) != ("bundle", "export") or "architecture" not in meta:
            return set()
        if "+" in meta["quant"]:
            return set()  # a mixture of types has no row of its own
    except (ValueError, KeyError, TypeError, OSError):
        return set()  # broken on purpose
    names = {table.name: kind for kind, table in ARCHITECTURES.items()}
    kind = names.get(meta["architecture"], meta["architecture"]) if meta["target"] == "gguf" else meta["architecture"]
    carriers = ["base", *(["lora"] if meta["adapters"] else [])]
    return {(meta["target"], meta["quant"], kind, carrier) for carrier in carriers}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`command("users", "show", "ana")`: what the command line does, in this process; its exit status."""
    import sys

    from edgealign import cli

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["edgealign", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published tiny LFM2 in float32: random weights, noisy norms, 512 tokens. Read it, do not change it."""
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    out = tmp_path_factory.mktemp("tiny") / "model"
    recipe = InitRecipe(shape="tiny", seed=1, vocab_size=512, context=512, dtype="float32", norm_noise=0.1)
    create.run(recipe, text=[], out=out)
    return out


@pytest.fixture(scope="session")
def tiny_lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyLora:
    """Factory of published PEFT LoRA adapters on `tiny_model`: `tiny_lora(seed=1, rank=4, targets=...)` -> directory.

    B is random, so the adapter does something; `strength` scales it. `base` takes another model directory.
    """

    def make(
        *, seed: int = 0, rank: int = 4, alpha: float = 8.0, strength: float = 0.05, rslora: bool = False,
        targets: Sequence[str] | None = None, base: Path | None = None, base_digest: str | None = None,
        **extra: object,
    ) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        from edgealign.artifact import open_artifact, publish
        from edgealign.models.lint import default_targets
        from edgealign.models.load import load_model

        source = base or tiny_model
        model = load_model(source)
        chosen = list(targets) if targets is not None else list(default_targets(model.config.model_type))
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=chosen, use_rslora=rslora, lora_dropout=0.0, **extra,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
            with torch.no_grad():
                for name, weight in adapted.named_parameters():
                    if "lora_B" in name or "lora_embedding_A" in name:
                        weight.copy_(strength * torch.randn_like(weight))
        base_artifact = open_artifact(source)
        out = tmp_path_factory.mktemp("lora") / f"adapter-{seed}"
        with publish(
            out, kind="adapter", format="peft", stage="test", recipe={"seed": seed},
            inputs=[base_artifact.as_input("base")],
        ) as draft:
            adapted.save_pretrained(draft.dir)
            (draft.dir / "README.md").unlink(missing_ok=True)
            config_file = draft.dir / "adapter_config.json"
            saved = json.loads(config_file.read_text(encoding="utf-8"))
            saved["base_model_name_or_path"] = None
            config_file.write_text(json.dumps(saved), encoding="utf-8")
            draft.meta["base_digest"] = base_digest or base_artifact.digest
        return out

    return make


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests leave nothing in the home directory; the llama.cpp probe is asked once per run."""
    os.environ["EDGEALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_model: Path, tiny_lora: TinyLora, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Factory of unverified GGUF bundles of `tiny_model` by quantisation, with users ana and ben; made once."""
    import shutil
    import sys

    from edgealign.artifact import open_artifact, publish

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
    made: dict[str, Path] = {}

    def make(quant: str) -> Path:
        if quant in made:
            return made[quant]
        from gguf_model import write_model
        from gguf_quantize import quantize

        from edgealign.models.load import read_config
        from edgealign.runtimes.gguf_adapter import write_lora_gguf

        out = tmp_path_factory.mktemp("bundle") / f"tiny-{quant}"
        base = open_artifact(tiny_model)
        with publish(out, kind="bundle", format="gguf", stage="test", recipe={"quant": quant}) as draft:
            whole = draft.dir.with_name("whole.gguf")
            write_model(tiny_model, whole, digest=base.digest)
            if quant == "f32":
                whole.replace(draft.dir / "model.gguf")
            else:
                quantize(whole, draft.dir / "model.gguf", quant, importance=None, threads=1)
            (draft.dir / "adapters").mkdir()
            users = {}
            for seed, user in enumerate(("ana", "ben"), start=1):
                file = f"adapters/{user}.gguf"
                write_lora_gguf(
                    tiny_lora(seed=seed), draft.dir / file, base_config=read_config(tiny_model), dtype="f32"
                )
                users[user] = {"file": file, "digest": ""}
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
                shutil.copy(tiny_model / name, draft.dir / name)
            draft.meta.update(
                target="gguf", quant=quant, model_file="model.gguf", adapters=users, model_digest=base.digest
            )
        made[quant] = out
        return out

    return make


@pytest.fixture(scope="session")
def onnx_tools() -> None:
    """Where onnxruntime and its model builder are not installed, a test is skipped; in CI that is a failure."""
    from importlib.util import find_spec

    needed = ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir", "onnxscript")
    missing = [name for name in needed if find_spec(name) is None]
    if missing and os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI needs the onnx extra: {', '.join(missing)} missing")
    if missing:
        pytest.skip(f"needs pip install 'edgealign[onnx]': {', '.join(missing)} missing")


@pytest.fixture(scope="session")
def onnx_bundle(
    onnx_tools: None, tiny_model: Path, tiny_lora: TinyLora, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Factory of unverified ONNX bundles of `tiny_model` by quantisation, with users ana and ben; made once."""
    import shutil
    import sys

    from edgealign.artifact import open_artifact, publish

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
    made: dict[str, Path] = {}

    def make(quant: str) -> Path:
        if quant in made:
            return made[quant]
        from genai_model import write_model

        from edgealign.runtimes.onnx_adapter import write_lora_onnx

        out = tmp_path_factory.mktemp("bundle") / f"tiny-{quant}"
        base = open_artifact(tiny_model)
        with publish(out, kind="bundle", format="onnx", stage="test", recipe={"quant": quant}) as draft:
            inputs = write_model(tiny_model, draft.dir, quant=quant, digest=base.digest)
            users = {}
            for seed, user in enumerate(("ana", "ben"), start=1):
                file = f"adapters/{user}.onnx_adapter"
                write_lora_onnx(tiny_lora(seed=seed), draft.dir / file, inputs=inputs)
                users[user] = {"file": file, "digest": ""}
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
                shutil.copy(tiny_model / name, draft.dir / name)
            draft.meta.update(
                target="onnx", quant=quant, model_file="model.onnx", adapters=users, model_digest=base.digest
            )
        made[quant] = out
        return out

    return make


@pytest.fixture(scope="session")
def executorch_tools() -> None:
    """Where executorch is not installed, a test is skipped; in CI that is a failure."""
    from importlib.util import find_spec

    if find_spec("executorch") is None:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail("CI needs the executorch extra")
        pytest.skip("needs pip install 'edgealign[executorch]'")


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published LFM2 of two layers, because ExecuTorch's compiler takes ten seconds for each. Do not change it."""
    from transformers import Lfm2Config

    from edgealign.artifact import publish
    from edgealign.models.create import write_model
    from edgealign.models.tokenizer import train_tokenizer

    out = tmp_path_factory.mktemp("short") / "model"
    config = Lfm2Config(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=7,
    )  # fmt: skip
    tokenizer = train_tokenizer([], vocab_size=400, context=256, max_bytes=100_000)
    with publish(out, kind="model", format="huggingface", stage="test", recipe={}) as draft:
        write_model(draft.dir, config, tokenizer, seed=2, dtype="float32", norm_noise=0.2)
    return out


@pytest.fixture(scope="session")
def executorch_bundle(
    executorch_tools: None, short_model: Path, tiny_lora: TinyLora, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Factory of unverified ExecuTorch bundles of `short_model` by quantisation, with users ana and ben.

    The compiler takes minutes: of several processes (pytest -n) the first makes a bundle and the others wait for it.
    """
    import shutil
    import sys

    from filelock import FileLock

    from edgealign.artifact import open_artifact, publish

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
    own = tmp_path_factory.getbasetemp()
    everyones = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def make(quant: str) -> Path:
        out = everyones / f"executorch-short-{quant}"
        with FileLock(f"{out}.lock"):
            if not out.exists():
                write(quant, out)
        return out

    def write(quant: str, out: Path) -> None:
        from executorch_lower import write_program

        from edgealign.runtimes.executorch_adapter import write_lora_executorch

        base = open_artifact(short_model)
        with publish(out, kind="bundle", format="executorch", stage="test", recipe={"quant": quant}) as draft:
            lowered = write_program(short_model, draft.dir / "model.pte", quant=quant, digest=base.digest)
            users = {}
            for seed, user in enumerate(("ana", "ben"), start=1):
                file = f"adapters/{user}.safetensors"
                adapter = tiny_lora(seed=seed, base=short_model, rank=3 + seed, rslora=seed == 2)
                write_lora_executorch(adapter, draft.dir / file, inputs=lowered.inputs)
                users[user] = {"file": file, "digest": ""}
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
                shutil.copy(short_model / name, draft.dir / name)
            draft.meta.update(
                target="executorch", quant=quant, model_file="model.pte", adapters=users, model_digest=base.digest
            )

    return make
