"""Tiny random autoencoders and text encoders in the form of real ones: diffusers' and transformers' own classes and files.

    tiny_autoencoder(folder, "wan")      config.json + diffusion_pytorch_model.safetensors, compression (4, 8, 8)
    tiny_text(folder, "t5+clip")         text_encoder/, tokenizer/ (and text_encoder_2/, tokenizer_2/), as pipelines have them

Nothing is downloaded: vocabularies are a few words and letters. Same arguments, same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCES = [
    "a red ball moves to the left on a white ground",
    "a blue square turns slowly over the green floor",
    "the small yellow star jumps up and down again",
    "two people walk along a street, while it rains",
    "grinning face with smiling eyes and a party hat",
]

_BLOCKS = (8, 8, 8, 8)
# name -> (class, settings): all of them compress by 8 in space; the video ones by 4 in time.
AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": _BLOCKS, "layers_per_block": 1, "norm_num_groups": 4},
    ),
    "wan": (
        "AutoencoderKLWan",
        {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": _BLOCKS,
            "decoder_block_out_channels": _BLOCKS,
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "patch_size": 2,
        },
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "latent_channels": 4,
            "block_out_channels": _BLOCKS,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
    ),
    "kl": (
        "AutoencoderKL",
        {
            "latent_channels": 4,
            "block_out_channels": _BLOCKS,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "norm_num_groups": 4,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": _BLOCKS,
            "decoder_block_out_channels": _BLOCKS,
            "num_encoder_blocks": (1, 1, 1, 1),
            "num_decoder_blocks": (1, 1, 1, 1),
        },
    ),
}


def autoencoder_class(name: str) -> Any:
    """diffusers' class of a name in ``AUTOENCODERS``."""
    import diffusers

    return getattr(diffusers, AUTOENCODERS[name][0])


def tiny_autoencoder(folder: Path, name: str, seed: int = 0, **over: Any) -> Path:
    """Save a random autoencoder (``over``: other constructor arguments) into ``folder``; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = autoencoder_class(name)(**{**AUTOENCODERS[name][1], **over})
        if name == "ltx":  # the released weights carry statistics, and zeros and ones would hide that they are used
            model.latents_mean.normal_(std=0.3)
            model.latents_std.uniform_(0.5, 2.0)
    model.eval().save_pretrained(str(folder), safe_serialization=True)
    return folder


def tiny_text(folder: Path, name: str = "t5+clip", *, width: int = 32, pooled: int = 24, seed: int = 0) -> Path:
    """Save random text encoders as a pipeline's folder; returns the folder.

    name: t5, umt5 or clip (text_encoder/, tokenizer/), or t5+clip as FLUX has them: CLIP in text_encoder/, T5 in
    text_encoder_2/. width: of T5's or the only encoder's states; pooled: of CLIP beside T5. Both divisible by 4.
    """
    if name == "t5+clip":
        _encoder(folder, "clip", pooled, "", seed)
        _encoder(folder, "t5", width, "_2", seed + 1)
    else:
        _encoder(folder, name, width, "", seed)
    return folder


def _encoder(folder: Path, name: str, width: int, suffix: str, seed: int) -> None:
    tokenizer = clip_tokenizer() if name == "clip" else t5_tokenizer()
    tokenizer.save_pretrained(str(folder / f"tokenizer{suffix}"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _clip(width, tokenizer) if name == "clip" else _t5(name, width, tokenizer)
    model.eval().save_pretrained(str(folder / f"text_encoder{suffix}"), safe_serialization=True)


def _t5(name: str, width: int, tokenizer: Any) -> Any:
    import transformers

    config = {"t5": transformers.T5Config, "umt5": transformers.UMT5Config}[name](
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[name](config)


def _clip(width: int, tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def t5_tokenizer() -> Any:
    """A ``T5Tokenizer`` with a unigram vocabulary: the words of ``SENTENCES``, single letters, and T5's special tokens."""
    from transformers import T5Tokenizer

    words = {f"▁{word}" for sentence in SENTENCES for word in sentence.replace(",", "").split()}
    letters = {*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.:;-'!?"}
    scored = [(piece, -4.0 if piece in words else -8.0) for piece in sorted(words | letters)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *scored]
    return T5Tokenizer(vocab=vocab, extra_ids=2, model_max_length=512)


def clip_tokenizer() -> Any:
    """A ``CLIPTokenizer`` whose pieces are single letters, inside a word and at its end; 77 tokens at most."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[], model_max_length=77)


# backbone -> autoencoder, text encoders, latent channels of the family
FAMILIES = {
    "flux": ("hunyuan", "t5+clip", 4),
    "wan": ("wan", "umt5", 16),
    "ltx": ("ltx", "t5", 8),
    "hunyuan": ("hunyuan", "t5+clip", 4),
    "cogvideox": ("cogvideox", "t5", 4),
}


def tiny_pipeline(folder: Path, name: str, **over: Any) -> Path:
    """A whole pipeline's folder of a backbone (vae, text encoders, transformer that fit together); returns the folder.
    ``over``: constructor arguments of the transformer."""
    from tests.tiny import POOLED, TEXT, tiny_config, tiny_transformer

    codec, text, channels = FAMILIES[name]
    tiny_autoencoder(folder / "vae", codec)
    tiny_text(folder, text, width=TEXT, pooled=POOLED)
    tiny_transformer(name, folder / "transformer", **{**tiny_config(name, channels), **over})
    if name == "cogvideox":  # whose weights mean nothing without their schedule
        from diffusers import CogVideoXDDIMScheduler

        CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ).save_pretrained(str(folder / "scheduler"))
    (folder / "model_index.json").write_text('{"_class_name": "Tiny"}')
    return folder
