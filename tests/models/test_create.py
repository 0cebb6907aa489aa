"""`edgealign init`: a complete model directory with random weights, an honest vocabulary and LFM2's ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact
from edgealign.models import create
from edgealign.models.load import load_model, load_tokenizer
from edgealign.models.recipes import InitRecipe
from edgealign.models.tokenizer import BUILT_IN_TEXT, SPECIAL_TOKENS, train_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi."},
]


def make(out: Path, *, text: tuple[Path, ...] = (), **fields: object) -> Path:
    create.run(InitRecipe(**{"shape": "tiny", "vocab_size": 400, "context": 64, **fields}), text=text, out=out)
    return out


def test_the_directory_is_complete_and_says_that_its_weights_are_random(tiny_model: Path) -> None:
    artifact = open_artifact(tiny_model, kind="model")
    names = {entry.path for entry in artifact.manifest.files}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert artifact.meta["weights"] == "random weights"
    assert artifact.manifest.template_hash


def test_special_tokens_stand_where_lfm2_has_them(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(14))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 7)


def test_config_and_generation_config_end_with_im_end(tiny_model: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tiny_model / name).read_text(encoding="utf-8"))["eos_token_id"] == 7


def test_the_template_renders_chatml_with_one_beginning(tiny_model: Path) -> None:
    text = load_tokenizer(tiny_model).apply_chat_template(CONVERSATION, tokenize=False)
    assert text == (
        "<|startoftext|><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n"
    )


def test_the_generation_prompt_is_a_prefix_of_the_answered_conversation(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    asked = tokenizer.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=False)
    answered = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert answered[: len(asked)] == asked
    assert answered.count(1) == 1


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "unknown role narrator"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}, "no tool calls"),
    ],
)
def test_the_template_refuses_what_it_would_drop(tiny_model: Path, turn: dict[str, object], reason: str) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=reason):
        load_tokenizer(tiny_model).apply_chat_template([turn], tokenize=False)


def test_every_embedding_row_has_a_token_and_no_text_reaches_a_reserved_one(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    model = load_model(tiny_model)
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 512
    reserved = {i for token, i in tokenizer.get_vocab().items() if token.startswith("<|reserved_")}
    assert reserved
    text = BUILT_IN_TEXT + "<|reserved_0|> <|reserved_1|> reserved_2"
    assert not reserved & set(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    "text", ["", " ", "Grüße, 東京! 🙂\n\n\tx  y\r\n", "it's 12345 o'clock", "\x00\x7f", "a\u0301"]
)
def test_any_text_survives_encoding_and_decoding(tiny_model: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    weights = [
        (make(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_making_a_model_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)


def test_the_tokenizer_learns_from_text_jsonl_and_gzip(tmp_path: Path) -> None:
    word = "zebrafinch "
    (tmp_path / "a.txt").write_text(word * 50, encoding="utf-8")
    rows = "\n".join(json.dumps({"messages": [{"role": "user", "content": "quokka quokka"}]}) for _ in range(40))
    (tmp_path / "b.jsonl").write_text(rows + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("axolotl axolotl\n" * 40)
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt.gz")]
    tokenizer = train_tokenizer(files, vocab_size=400, context=64, max_bytes=1_000_000)
    for learned in (" zebrafinch", " quokka", " axolotl"):
        assert len(tokenizer(learned, add_special_tokens=False).input_ids) == 1, learned


def test_large_text_is_read_only_as_far_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("first first first\n" * 20 + "second second second\n" * 20, encoding="utf-8")
    tokenizer = train_tokenizer([file], vocab_size=400, context=64, max_bytes=200)
    assert " second" not in [tokenizer.decode([i]) for i in range(len(tokenizer))]


def test_the_text_is_named_by_digest_and_stays_out_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a secret sentence " * 30, encoding="utf-8")
    out = make(tmp_path / "m", text=(tmp_path / "a.txt",))
    manifest = (out / "manifest.json").read_text(encoding="utf-8")
    assert open_artifact(out).manifest.inputs[0].role == "text"
    assert "secret" not in manifest
    assert str(tmp_path) not in manifest


def test_a_large_shape_is_stored_in_16_bits_unless_told_otherwise(tmp_path: Path) -> None:
    assert open_artifact(make(tmp_path / "a")).meta["dtype"] == "float32"
    small_bf16 = make(tmp_path / "b", dtype="bfloat16")
    assert open_artifact(small_bf16).meta["dtype"] == "bfloat16"
    assert (small_bf16 / "model.safetensors").stat().st_size < 0.6 * (tmp_path / "a/model.safetensors").stat().st_size


def test_noise_spreads_the_norms_and_only_them(tmp_path: Path) -> None:
    import torch

    plain, noisy = (load_model(make(tmp_path / n, norm_noise=v)).state_dict() for n, v in (("a", 0.0), ("b", 0.1)))
    norm, matrix = "model.layers.0.operator_norm.weight", "model.layers.0.feed_forward.w1.weight"
    assert plain[norm].std() == 0
    assert 0.05 < noisy[norm].std() < 0.2
    assert torch.equal(plain[matrix], noisy[matrix])
