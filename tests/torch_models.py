"""Tiny models with random weights in the on-disk formats of diffusers and transformers."""

import pathlib

import diffusers
import torch
import transformers


def tiny_vae(folder: pathlib.Path, *, seed: int = 0, latent_channels: int = 4) -> pathlib.Path:
    """An AutoencoderKL of factor 8."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=latent_channels,
    )
    model.save_pretrained(folder)
    return folder


def tiny_clip(folder: pathlib.Path, *, width: int = 16, seed: int = 0) -> pathlib.Path:
    """CLIP's vision tower with a projection to `width`."""
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=width, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


ATR_NAMES = (
    "Background", "Hat", "Hair", "Sunglasses", "Upper-clothes", "Skirt", "Pants", "Dress", "Belt", "Left-shoe",
    "Right-shoe", "Face", "Left-leg", "Right-leg", "Left-arm", "Right-arm", "Bag", "Scarf",
)  # fmt: skip
"""As a SegFormer trained on ATR names its classes."""


def tiny_segformer(folder: pathlib.Path, names: tuple[str, ...] = ATR_NAMES) -> pathlib.Path:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 1], mlp_ratios=[2, 2], decoder_hidden_size=8, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    for parameter in model.parameters():  # else one class wins everywhere
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    transformers.SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_vitpose(folder: pathlib.Path, joints: int = 17) -> pathlib.Path:
    torch.manual_seed(0)
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[32, 24], patch_size=[8, 8], hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        out_indices=[1], out_features=["stage1"],
    )  # fmt: skip
    names = {i: f"joint{i}" for i in range(joints)}
    config = transformers.VitPoseConfig(backbone_config=backbone, use_simple_decoder=True, id2label=names)
    model = transformers.VitPoseForPoseEstimation(config)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    transformers.VitPoseImageProcessorPil(size={"height": 32, "width": 24}).save_pretrained(folder)
    return folder


def tiny_detector(folder: pathlib.Path, names: tuple[str, ...] = ("cat", "person")) -> pathlib.Path:
    """A YOLOS that takes every box for its last class."""
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=4, id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    model = transformers.YolosForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias[len(names) - 1] = 20.0
        model.bbox_predictor.layers[-1].weight.normal_(std=2.0)
    model.save_pretrained(folder)
    transformers.YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
