"""The README's snippets on detection and segmentation run as they are."""

import readme
import torch

ROADS = ("mmengine", "torchvision", "transformers", "segmentation_models_pytorch")
TEXTS = readme.snippets("Detection and segmentation")
SNIPPETS = {road: text for text in TEXTS for road in ROADS if road in text}


def test_there_is_a_snippet_for_every_road():
    assert SNIPPETS.keys() == set(ROADS) and len(TEXTS) == len(ROADS)


def test_torchvision_detects():
    torch.manual_seed(0)
    found = readme.run(SNIPPETS["torchvision"])["found"]
    assert {"boxes", "labels", "scores", "masks"} == found.keys()
    assert found["masks"].shape[1:] == (1, 256, 320)


def test_transformers_segments():
    names = readme.run(SNIPPETS["transformers"])
    assert names["queries"].shape == (1, 100, 32, 40)
    assert names["logits"].shape == (1, 150, 128, 160)


def test_segmentation_models_pytorch_segments():
    segmenter = readme.run(SNIPPETS["segmentation_models_pytorch"])["segmenter"]
    assert segmenter.eval()(torch.randn(1, 1, 64, 96)).shape == (1, 2, 64, 96)
