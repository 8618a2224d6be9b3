"""MiniLM: fixed length, masks, independence from the batch, and parity with sentence-transformers."""

from __future__ import annotations

import pytest
import torch

from archipel.config import Text
from archipel.encoders.text import POOLED_SCALE, MiniLM, open_text
from archipel.errors import ArchipelError

CAPTIONS = ["a red ball moves", "grinning face", "", "Ünïcode: 红色的球 🎈", "a dog's tail, wagging -- twice!"]


@pytest.fixture(scope="module")
def encoder() -> MiniLM:
    return open_text(Text(tokens=24))


def test_shapes_masks_and_zero_padding(encoder: MiniLM) -> None:
    condition = encoder.encode(CAPTIONS)
    assert condition.tokens.shape == (5, 24, 384) and condition.tokens.dtype == torch.float32
    assert condition.mask.shape == (5, 24) and condition.mask.dtype == torch.bool
    assert condition.pooled.shape == (5, 384) and not condition.tokens.requires_grad
    assert torch.equal(condition.tokens.abs().sum(-1) > 0, condition.mask)
    assert bool((condition.mask.long().diff(dim=1) <= 0).all())  # real tokens first
    assert condition.mask.sum(1).tolist()[:3] == [6, 4, 2]  # [CLS] words [SEP]; the empty caption keeps both
    assert torch.allclose(condition.pooled.norm(dim=1) / POOLED_SCALE, torch.ones(5), atol=1e-5)


def test_the_empty_caption_is_not_the_null_text(encoder: MiniLM) -> None:
    empty = encoder.encode([""])
    assert int(empty.mask.sum()) == 2 and float(empty.pooled.norm()) > 0.99 * POOLED_SCALE
    assert not torch.equal(empty.pooled, empty.null().pooled)
    assert torch.equal(empty.pooled, encoder.encode(["  "]).pooled)


def test_no_captions_are_an_empty_batch_of_the_same_widths(encoder: MiniLM) -> None:
    none = encoder.encode([])
    assert (none.tokens.shape, none.mask.shape, none.pooled.shape) == ((0, 24, 384), (0, 24), (0, 384))
    assert none.mask.dtype == torch.bool and encoder.truncated([]) == []


def test_a_row_does_not_depend_on_the_rest_of_the_batch(encoder: MiniLM) -> None:
    together = encoder.encode([*CAPTIONS, "word " * 200] * 14)  # crosses the internal batch
    for row, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        for copy in (row, row + 6 * 13):
            assert torch.allclose(together.tokens[copy], alone.tokens[0], atol=1e-5)
            assert torch.allclose(together.pooled[copy], alone.pooled[0], atol=1e-5)
            assert torch.equal(together.mask[copy], alone.mask[0])
    assert torch.equal(encoder.encode(CAPTIONS).tokens, encoder.encode(CAPTIONS).tokens)


def test_a_caption_does_not_depend_on_how_far_it_is_padded(encoder: MiniLM) -> None:
    longer = open_text(Text(tokens=48)).encode(CAPTIONS)
    shorter = encoder.encode(CAPTIONS)
    assert torch.allclose(longer.tokens[:, :24], shorter.tokens, atol=1e-5)
    assert torch.allclose(longer.pooled, shorter.pooled, atol=1e-5)
    assert not bool(longer.mask[:, 24:].any())


def test_long_captions_are_cut_and_named(encoder: MiniLM) -> None:
    exact = " ".join(["cat"] * 22)  # with [CLS] and [SEP] just 24
    captions = ["short", exact, exact + " dog", "long " * 10_000]
    assert encoder.truncated(captions) == [2, 3]
    condition = encoder.encode(captions)
    assert condition.mask[1:].all() and condition.mask.shape == (4, 24)
    assert torch.allclose(condition.tokens[1], condition.tokens[2], atol=1e-5)  # the 23rd word is what was cut


def test_text_that_is_no_text_is_refused_by_number(encoder: MiniLM) -> None:
    for call in (encoder.encode, encoder.truncated):
        with pytest.raises(ArchipelError, match="caption 1 is not valid text at character 2"):
            call(["fine", "a \udcff b"])


def test_pooled_vectors_are_those_of_sentence_transformers(encoder: MiniLM) -> None:
    from sentence_transformers import SentenceTransformer

    from archipel.encoders.weights import weights_file

    theirs = SentenceTransformer(str(weights_file("minilm").parent), device="cpu", local_files_only=True)
    expected = torch.from_numpy(theirs.encode(CAPTIONS))
    assert torch.allclose(encoder.encode(CAPTIONS).pooled / POOLED_SCALE, expected, atol=1e-5)
