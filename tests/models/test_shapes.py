"""The named shapes have the parameter counts of the models that they are named after."""

from __future__ import annotations

import pytest

from edgealign.errors import RecipeError
from edgealign.models.shapes import BOS_ID, EOS_ID, PAD_ID, SHAPES, parameter_count, shape

PUBLISHED = {
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2-8b-a1b": 8_339_929_856,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_its_published_parameter_count(name: str) -> None:
    assert parameter_count(name) == PUBLISHED[name]


def test_every_published_name_is_either_counted_or_a_test_shape() -> None:
    assert set(SHAPES) - set(PUBLISHED) == {
        "tiny", "small", "tiny-moe", "tiny-lfm3", "starter", "starter-teacher", "starter-llama",
    }


def test_the_tiny_shape_is_tiny_and_fits_quantisation_blocks() -> None:
    facts = shape("tiny").facts
    assert 500_000 < parameter_count("tiny") < 1_500_000
    assert facts["hidden_size"] % 32 == 0
    assert facts["intermediate_size"] % 256 == 0


@pytest.mark.parametrize("name", SHAPES)
def test_every_configuration_ends_a_turn_with_im_end(name: str) -> None:
    config = shape(name).config()
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID) == (0, 1, 7)


def test_vocabulary_and_context_can_be_overridden() -> None:
    config = shape("lfm2-350m").config(vocab_size=1000, context=64)
    assert (config.vocab_size, config.max_position_embeddings) == (1000, 64)


def test_an_unknown_shape_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"lfm2-350: is not a known shape \(did you mean lfm2-350m\?\)"):
        shape("lfm2-350")
