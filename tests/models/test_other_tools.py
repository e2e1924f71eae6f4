"""The backbones inside the packages that people put around timm models; small where the package passes arguments on."""

import io

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from families import COMPILED, PYRAMIDS, create, family, images
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

one_of_each_pyramid = pytest.mark.parametrize("name", [name for name in COMPILED if name in PYRAMIDS])
# transformers and others build the published size; one name is enough for their plumbing.
FULL = "vmamba_tiny"


@one_of_each_pyramid
@pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN])
def test_segmentation_models_pytorch_takes_them_as_encoders(name, decoder):
    torch.manual_seed(0)
    net = decoder(f"tu-{name}", encoder_weights=None, in_channels=1, classes=2, **family(name).small)
    assert net.encoder.out_channels[-len(family(name).dims) :] == list(family(name).dims)
    out = net(images(2, 1, 64, 96))
    assert out.shape == (2, 2, 64, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())


class Pyramid(nn.Module):
    """What torchvision's detectors ask of a backbone: a dictionary of maps of equal width."""

    def __init__(self, name: str, out_channels: int):
        super().__init__()
        self.body = create(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(level): fmap for level, fmap in enumerate(self.body(x))})


@one_of_each_pyramid
def test_torchvision_mask_rcnn_trains_and_predicts_on_their_features(name):
    torch.manual_seed(0)
    levels = [str(level) for level in range(len(family(name).dims))]
    net = MaskRCNN(
        Pyramid(name, 16),
        num_classes=2,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**i,) for i in range(len(levels))), ((1.0,),) * len(levels)),
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2),
        box_detections_per_img=5,
    )
    mask = torch.zeros(1, 64, 80, dtype=torch.uint8)
    mask[:, 16:40, 16:48] = 1
    target = {
        "boxes": torch.tensor([[16.0, 16.0, 48.0, 40.0]]),
        "labels": torch.ones(1, dtype=torch.long),
        "masks": mask,
    }
    losses = net.train()([images(3, 64, 80)], [target])
    assert {"loss_mask", "loss_box_reg", "loss_objectness"} <= losses.keys()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in net.backbone.body.parameters())
    with torch.inference_mode():
        (found,) = net.eval()([images(3, 64, 80)])
    assert found["boxes"].shape[1] == 4 and found["masks"].shape[2:] == (64, 80)


def test_transformers_backbone_gives_the_maps_of_features_only():
    torch.manual_seed(0)
    backbone = TimmBackbone(TimmBackboneConfig(backbone=FULL, out_indices=(0, 1, 2, 3))).eval()
    assert backbone.channels == [96, 192, 384, 768]
    own = timm.create_model(FULL, features_only=True).eval()
    own.load_state_dict({key.removeprefix("_backbone."): value for key, value in backbone.state_dict().items()})
    x = images(1, 3, 64, 96)
    with torch.inference_mode():
        for got, want in zip(backbone(x).feature_maps, own(x), strict=True):
            torch.testing.assert_close(got, want)


def test_transformers_segmenters_take_the_backbone():
    config = UperNetConfig(
        backbone_config=TimmBackboneConfig(backbone=FULL, out_indices=(0, 1, 2, 3)),
        num_labels=5,
        hidden_size=16,
        auxiliary_in_channels=384,
        auxiliary_channels=8,
    )
    net = UperNetForSemanticSegmentation(config)
    out = net(images(2, 3, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.long))
    assert out.logits.shape == (2, 5, 64, 64)
    out.loss.backward()
    assert net.backbone._backbone.model.stem.conv1.weight.grad is not None


def test_transformers_classifier_wrapper_saves_and_loads(tmp_path):
    net = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=FULL, num_labels=7)).eval()
    x = images(1, 3, 64, 64)
    net.save_pretrained(tmp_path)
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    loaded = again.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in net.state_dict().items())
    with torch.inference_mode():
        # The loaded weights may lie elsewhere in memory, which changes the rounding of matrix products.
        torch.testing.assert_close(again(x).logits, net(x).logits)
        assert net(x).logits.shape == (1, 7)


@pytest.mark.parametrize("name", COMPILED)
def test_timm_transforms_made_from_the_configuration_feed_the_model(name):
    model = create(name, num_classes=3)
    config = resolve_data_config({}, model=model)
    pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    x = create_transform(**config)(Image.fromarray(pixels))
    assert x.shape == tuple(model.pretrained_cfg["input_size"])
    expected = (pixels.mean((0, 1)) / 255 - config["mean"]) / config["std"]
    np.testing.assert_allclose(x.mean((1, 2)), expected, atol=0.1)
    assert model(x[None]).shape == (1, 3)


def test_a_whole_model_can_be_saved_and_loaded_by_torch():
    model, buffer = create(FULL), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = images(1, 3, 32, 32)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), model(x))


def test_transformers_mask2former_trains_on_their_features():
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=TimmBackboneConfig(backbone=FULL, out_indices=(0, 1, 2, 3)),
        num_labels=3,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        num_queries=5,
        train_num_points=64,
    )
    net = Mask2FormerForUniversalSegmentation(config)
    masks = torch.zeros(2, 64, 96)
    masks[0, :30], masks[1, 30:] = 1, 1
    out = net(pixel_values=images(1, 3, 64, 96), mask_labels=[masks], class_labels=[torch.tensor([0, 2])])
    assert out.masks_queries_logits.shape == (1, 5, 16, 24)
    out.loss.sum().backward()
    assert net.model.pixel_level_module.encoder._backbone.model.stem.conv1.weight.grad.abs().sum() > 0
