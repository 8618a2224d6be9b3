"""Text encoders of transformers: parity with what diffusers' pipelines compute, lengths, masks, padding, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_parts import clip_tokenizer, t5_tokenizer, tiny_text

from archipel import store
from archipel.config import Text
from archipel.encoders import outside, resolving
from archipel.encoders.text import open_text
from archipel.encoders.transformers_text import TransformersText
from archipel.errors import ArchipelError, ConfigError, DamagedError, MissingStageError

CAPTIONS = ["a red ball jumps", "the small yellow star jumps up and down again and again, while it rains on zebras", ""]
KINDS = ("t5", "umt5", "clip", "t5+clip")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("texts")
    return {name: tiny_text(root / name, name) for name in KINDS}


def opened(folder: Path, target: Path, **over: Any) -> TransformersText:
    values = {**resolving.text_values(str(folder)), "tokens": 20, **over}
    files = outside.take_text(resolving.text_places(str(folder)), target, "text")
    store.write_card(target, "text", "run", files)
    encoder = open_text(Text.model_validate(values), target)
    assert isinstance(encoder, TransformersText)
    return encoder


def pipeline(name: str, folder: Path) -> Any:
    """diffusers' own pipeline with these text encoders and nothing else."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel, UMT5EncoderModel

    rest = {"vae": None, "scheduler": None, "transformer": None}
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    if name == "umt5":
        model = UMT5EncoderModel.from_pretrained(str(folder / "text_encoder"))
        return diffusers.WanPipeline(text_encoder=model, tokenizer=tokenizer, **rest)
    return diffusers.FluxPipeline(
        text_encoder=CLIPTextModel.from_pretrained(str(folder / "text_encoder")),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel.from_pretrained(str(folder / "text_encoder_2")),
        tokenizer_2=AutoTokenizer.from_pretrained(str(folder / "tokenizer_2")),
        **rest,
    )


@torch.no_grad()
def test_umt5_is_what_wan_pipeline_reads(made: dict[str, Path], tmp_path: Path) -> None:
    found = opened(made["umt5"], tmp_path).encode(CAPTIONS)
    pipe = pipeline("umt5", made["umt5"])
    wanted, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=20)
    assert torch.allclose(found.tokens, wanted, atol=1e-6)


@torch.no_grad()
def test_t5_and_clip_with_padding_kept_are_what_flux_pipeline_reads(made: dict[str, Path], tmp_path: Path) -> None:
    found = opened(made["t5+clip"], tmp_path, padding="kept").encode(CAPTIONS)
    pipe = pipeline("t5+clip", made["t5+clip"])
    tokens, pooled, _ = pipe.encode_prompt(CAPTIONS, None, max_sequence_length=20)
    assert torch.allclose(found.tokens, tokens, atol=1e-6)
    assert torch.allclose(found.pooled, pooled, atol=1e-6)
    assert found.mask.sum(1).tolist() != [20] * 3 and float(found.tokens[~found.mask].abs().sum()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_shapes_masks_and_padding(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    encoder = opened(made[name], tmp_path / "a")
    found = encoder.encode(CAPTIONS)
    assert found.tokens.shape == (3, 20, encoder.width) and found.tokens.dtype == torch.float32
    assert found.mask.shape == (3, 20) and found.pooled.shape == (3, encoder.pooled_width)
    assert (encoder.width, encoder.pooled_width) == (32, 24 if name == "t5+clip" else 32)
    assert float(found.tokens[~found.mask].abs().sum()) == 0
    assert found.mask[2].any() and not found.mask[2].all(), "an empty caption still has its special tokens"
    assert encoder.truncated(CAPTIONS) == [1]
    # Longer: the same tokens, more padding; and no row depends on the others.
    longer = opened(made[name], tmp_path / "b", tokens=60).encode(CAPTIONS[::2])
    assert torch.allclose(longer.tokens[:, :20], found.tokens[::2], atol=1e-5)
    assert torch.allclose(longer.pooled, found.pooled[::2], atol=1e-5)
    alone = encoder.encode(CAPTIONS[1:2])
    assert torch.allclose(alone.tokens[0], found.tokens[1], atol=1e-5)
    empty = encoder.encode([])
    assert empty.tokens.shape == (0, 20, encoder.width) and empty.pooled.shape == (0, encoder.pooled_width)


def test_the_pooled_vector_without_clip_is_the_mean_of_real_tokens(made: dict[str, Path], tmp_path: Path) -> None:
    found = opened(made["t5"], tmp_path).encode(CAPTIONS)
    for row in range(3):
        assert torch.allclose(found.pooled[row], found.tokens[row][found.mask[row]].mean(0), atol=1e-6)


def test_clip_beside_t5_reads_its_own_length(made: dict[str, Path], tmp_path: Path) -> None:
    """A caption that T5's length cuts is still whole for CLIP's pooled vector."""
    short, long = (opened(made["t5+clip"], tmp_path / str(n), tokens=n).encode(CAPTIONS[1:2]) for n in (8, 40))
    assert torch.allclose(short.pooled, long.pooled, atol=1e-6)
    assert short.mask.all() and not torch.allclose(short.tokens[0, -1], long.tokens[0, 7])


def test_two_folders_joined_by_a_plus_sign(made: dict[str, Path], tmp_path: Path) -> None:
    whole = made["t5+clip"]
    for side, suffix in (
        ("one", ""),
        ("two", "_2"),
    ):  # an encoder and its tokenizer in one folder, as transformers saves them
        shutil.copytree(whole / f"text_encoder{suffix}", tmp_path / side)
        shutil.copytree(whole / f"tokenizer{suffix}", tmp_path / side, dirs_exist_ok=True)
    source = f"{tmp_path / 'one'}+{tmp_path / 'two'}"
    values = resolving.text_values(source)
    assert values["encoder"] == "t5+clip" and values["path"] == source
    files = outside.take_text(resolving.text_places(source), tmp_path / "run", "text")
    store.write_card(tmp_path / "run", "text", "run", files)
    joined = TransformersText(Text.model_validate({**values, "tokens": 20}), tmp_path / "run").encode(CAPTIONS)
    assert torch.equal(joined.pooled, opened(whole, tmp_path / "whole").encode(CAPTIONS).pooled)


def test_halves_of_characters_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArchipelError, match="not valid text"):
        opened(made["t5"], tmp_path).encode(["\ud800"])


def test_what_is_missing_or_other_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    config = Text.model_validate({**resolving.text_values(str(made["t5"])), "tokens": 20})
    with pytest.raises(MissingStageError, match="archipel prepare"):
        open_text(config, tmp_path)
    with pytest.raises(MissingStageError):
        open_text(config)
    opened(made["umt5"], tmp_path / "run")
    with pytest.raises(DamagedError, match=r"holds umt5, run.toml says 't5'"):
        open_text(config, tmp_path / "run")


def test_weights_that_lack_tensors_are_not_left_at_random(made: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(made["t5"], tmp_path / "torn")
    path = tmp_path / "torn" / "text_encoder" / "model.safetensors"
    tensors = load_file(str(path))
    gone = next(name for name in tensors if "wo.weight" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, str(path), {"format": "pt"})
    with pytest.raises(DamagedError, match="lacks 1 tensors"):
        opened(tmp_path / "torn", tmp_path / "run")


def test_encoders_that_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ConfigError, match=r"type 'llama': .* t5, umt5 and clip_text_model"):
        resolving.text_values(str(tmp_path))


def test_files_that_are_no_encoder_are_damaged(made: dict[str, Path], tmp_path: Path) -> None:
    opened(made["t5"], tmp_path)
    config = Text.model_validate({**resolving.text_values(str(made["t5"])), "tokens": 20})
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()  # linked to the source: not written into
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedError, match="no text encoder that can be opened"):
        open_text(config, tmp_path)


@torch.no_grad()
def test_whole_models_in_bfloat16_and_shards_give_their_text_side(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A T5 with its decoder and a CLIP with its images, as they are published: the text side is used, in float32."""
    import transformers

    tokenizer, letters = t5_tokenizer(), clip_tokenizer()
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    t5.eval().to(torch.bfloat16).save_pretrained(str(tmp_path / "t5"), max_shard_size="20KB")
    tokenizer.save_pretrained(str(tmp_path / "t5"))
    sides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 513, "bos_token_id": 512, "eos_token_id": 513}
    config = transformers.CLIPConfig(
        text_config={**sides, **ends, "vocab_size": len(letters)},
        vision_config={**sides, "image_size": 16, "patch_size": 8},
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(str(tmp_path / "clip"))
    letters.save_pretrained(str(tmp_path / "clip"))
    assert len(list((tmp_path / "t5").glob("*.safetensors"))) > 1
    source = f"{tmp_path / 't5'}+{tmp_path / 'clip'}"
    values = {**resolving.text_values(source), "tokens": 12}
    files = outside.take_text(resolving.text_places(source), tmp_path / "run", "text")
    store.write_card(tmp_path / "run", "text", "run", files)
    capfd.readouterr()
    found = open_text(Text.model_validate(values), tmp_path / "run").encode(CAPTIONS[:1])
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    given = tokenizer(CAPTIONS[:1], padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    wanted = t5.float().encoder(**given).last_hidden_state
    assert torch.allclose(found.tokens[found.mask], wanted[found.mask], atol=1e-5)
    ids = letters(CAPTIONS[:1], padding="max_length", max_length=77, return_tensors="pt")
    assert torch.allclose(found.pooled, clip.text_model(**ids).pooler_output, atol=1e-5)
