"""The architectures that conversion is tested with: networks of transformers and timm.

One record for each, in ``ALL``. A tiny network has the parts of its large one, more layers than the
first and the last, and numbers that differ where a mistake could otherwise not be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architecture import (
    PIXELS,
    SPECIAL,
    VOCABULARY,
    Architecture,
    Inputs,
    images,
    images_and_text,
    only_images,
    pixels_alone,
    spectrograms,
    spectrograms_alone,
    tokens,
    waves,
)

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}  # heads share keys and values
GROUPED_8 = {**GROUPED, "head_dim": 8}
ENCODER = {**DECODER, "type_vocab_size": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": 16,
}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    **SPECIAL,
}


def text(
    name: str, large: dict[str, Any] | None = None, refused: str = "", **tiny: Any
) -> Architecture:
    """A network of transformers that continues text."""
    return Architecture(
        "transformers", name, tokens, tiny, large or {}, generates=True, refused=refused
    )


def other(name: str, inputs: Callable[[], Inputs], **tiny: Any) -> Architecture:
    """A network of transformers that does something else."""
    return Architecture("transformers", name, inputs, tiny)


def vision(name: str, small: str = "", refused: str = "", **tiny: Any) -> Architecture:
    """A network of timm."""
    tiny = {"num_classes": 10, **tiny}
    return Architecture("timm", name, only_images, tiny, small=small, refused=refused)


TEXT = (
    text("LlamaForCausalLM", **GROUPED),
    text("MistralForCausalLM", **GROUPED, sliding_window=4),
    text("MixtralForCausalLM", **GROUPED, num_local_experts=4),
    text("Qwen2ForCausalLM", **GROUPED),
    text("Qwen3ForCausalLM", **GROUPED_8),
    text("GemmaForCausalLM", **GROUPED_8),
    text("Gemma2ForCausalLM", **GROUPED_8, sliding_window=4),
    text("Gemma3ForCausalLM", **GROUPED_8, sliding_window=4),
    text("Phi3ForCausalLM", **GROUPED),
    text("PhiForCausalLM", **DECODER),
    text("GPTNeoXForCausalLM", **DECODER),
    text(
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        **SPECIAL,
    ),
    text("FalconForCausalLM", refused="FalconLinear is a subclass of Linear", **DECODER),
    text("OPTForCausalLM", **DECODER, ffn_dim=48, word_embed_proj_dim=16),
    text(
        "BloomForCausalLM",
        large={"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        **SPECIAL,
    ),
    text(
        "MambaForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        **SPECIAL,
    ),
    text(
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **SPECIAL,
    ),
    text("BartForConditionalGeneration", **SPEECH, max_position_embeddings=32),
    other("BertForMaskedLM", tokens, **ENCODER),
    other("RobertaForMaskedLM", tokens, **ENCODER),
    other(
        "MobileBertForMaskedLM",
        tokens,
        **ENCODER,
        embedding_size=16,
        true_hidden_size=24,
        intra_bottleneck_size=24,
    ),
    other(
        "DebertaV2ForMaskedLM",
        tokens,
        **ENCODER,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        norm_rel_ebd="layer_norm",
        conv_kernel_size=3,
        conv_act="gelu",
    ),
)
SOUND = (
    Architecture(
        "transformers",
        "WhisperForConditionalGeneration",
        spectrograms,
        {
            **SPEECH,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "max_target_positions": 32,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        generates=True,
    ),
    other(
        "Wav2Vec2ForCTC",
        waves,
        **DECODER,
        conv_dim=(16, 16, 16),
        conv_kernel=(5, 3, 3),
        conv_stride=(4, 2, 2),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    ),
    other(  # transposed convolutions of sequences
        "SpeechT5HifiGan",
        spectrograms_alone,
        model_in_dim=8,
        upsample_initial_channel=32,
        upsample_rates=(4, 2),
        upsample_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3, 5),
        resblock_dilation_sizes=((1, 3), (1, 3)),
    ),
)
IMAGES = (
    other("ViTForImageClassification", images, **VISION),
    other("Dinov2ForImageClassification", images, **VISION),
    other(
        "SwinForImageClassification",
        images,
        image_size=PIXELS,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
    ),
    other(
        "ConvNextForImageClassification",
        images,
        hidden_sizes=(16, 24, 32, 40),
        depths=(1, 1, 2, 1),
    ),
    other(
        "ResNetForImageClassification",
        images,
        embedding_size=16,
        hidden_sizes=(16, 32, 32, 64),
        depths=(1, 1, 1, 1),
    ),
    other(
        "CLIPModel",
        images_and_text,
        text_config=DECODER,
        vision_config=VISION,
        projection_dim=24,
    ),
    other("SiglipModel", images_and_text, text_config=DECODER, vision_config=VISION),
    other(  # transposed convolutions of images
        "DPTForDepthEstimation",
        pixels_alone,
        **{**VISION, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 24, 32, 40],
        fusion_hidden_size=16,
    ),
)
PATCHES = {"img_size": PIXELS, "patch_size": 16, "embed_dim": 32}
BLOCKS = {**PATCHES, "depth": 2, "num_heads": 4}
SHIFTED = {
    "img_size": PIXELS,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
}
STAGES = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}
TIMM = (
    vision("resnet50", layers=(1, 1, 2, 1), channels=(16, 16, 24, 32)),
    vision(
        "resnetv2_50x1_bit",
        small="ResNetV2",
        refused="StdConv2d is a subclass of Conv2d",
        layers=(1, 1, 2, 1),
        channels=(128, 128, 128, 128),  # a quarter of them is normed in 32 groups
    ),
    vision("regnety_032", small="regnety_002"),
    vision("densenet121", growth_rate=8, block_config=(2, 2, 2, 2)),
    vision("efficientnet_b0", small="test_efficientnet"),
    vision("mobilenetv3_large_100", small="mobilenetv3_small_050"),
    vision("dm_nfnet_f0", small="test_nfnet"),
    vision("convnext_tiny", **STAGES),
    vision("mambaout_tiny", **STAGES),
    vision("mixer_b16_224", small="MlpMixer", **PATCHES, num_blocks=2),
    vision("vit_base_patch16_224", **BLOCKS),
    vision("deit_base_distilled_patch16_224", **BLOCKS),
    vision("beit_base_patch16_224", **BLOCKS),
    vision("eva02_base_patch14_224", **BLOCKS),
    vision("xcit_small_12_p16_224", **BLOCKS),
    vision("swin_tiny_patch4_window7_224", **SHIFTED),
    vision("swinv2_tiny_window8_256", **SHIFTED),
    vision(
        "coatnet_0_rw_224",
        img_size=PIXELS,
        embed_dim=(32, 32, 32, 32),
        depths=(1, 1, 1, 1),
    ),
    vision(
        "levit_256",
        img_size=PIXELS,
        embed_dim=(16, 24, 32),
        num_heads=(2, 2, 2),
        depth=(1, 1, 1),
        key_dim=8,
    ),
)
ALL = (*TEXT, *SOUND, *IMAGES, *TIMM)
