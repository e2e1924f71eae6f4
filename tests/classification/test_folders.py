"""Folders of labelled pictures: which classes compete, and what a target means."""

import pytest
import torch
from classification.pictures import write_pictures
from PIL import Image
from timm.data import ImageNetInfo

from vssm.classification.folders import class_folder, evaluation_loader, imagenet_folder

NUMBERS = ImageNetInfo().label_names()
CONFIG = {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875}
CONFIG["crop_mode"] = "center"


def labelled(dataset, size: int = 32, batch_size: int = 2, workers: int = 0) -> list[tuple[float, int]]:
    """(brightness, target) of every picture as the loader gives it."""
    loader = evaluation_loader(dataset, CONFIG, size, batch_size, torch.device("cpu"), workers)
    found = []
    for images, targets in loader:
        assert images.shape[1:] == (3, size, size)
        found += zip(((images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255).round().tolist(), targets.tolist(), strict=True)
    return sorted(found)


def test_targets_of_imagenet_are_indices_of_all_its_classes(tmp_path):
    root = write_pictures(tmp_path, {NUMBERS[7]: [10, 11], NUMBERS[2]: [20], NUMBERS[999]: [30]})
    dataset, classes = imagenet_folder(root)
    assert classes is None
    assert labelled(dataset) == [(10, 7), (11, 7), (20, 2), (30, 999)]
    assert labelled(dataset, workers=2, batch_size=3) == [(10, 7), (11, 7), (20, 2), (30, 999)]


def test_only_the_classes_with_a_folder_compete_in_a_part(tmp_path):
    root = write_pictures(tmp_path, {NUMBERS[7]: [10, 11], NUMBERS[2]: [20], NUMBERS[999]: [30]})
    dataset, classes = imagenet_folder(root, part=True)
    assert classes == [2, 7, 999]
    assert labelled(dataset) == [(10, 1), (11, 1), (20, 0), (30, 2)]


def test_folders_of_imagenet_v2_are_numbers_not_texts(tmp_path):
    dataset, classes = imagenet_folder(write_pictures(tmp_path, {"10": [1], "9": [2], "100": [3]}))
    assert classes is None and labelled(dataset) == [(1, 10), (2, 9), (3, 100)]


@pytest.mark.parametrize("names", [["cats"], [NUMBERS[0], "cats"], ["0", "1000"], ["0", NUMBERS[1]], ["n00000001"]])
def test_a_folder_that_is_no_class_of_imagenet_is_named(tmp_path, names):
    write_pictures(tmp_path, {name: [0] for name in names})
    with pytest.raises(ValueError, match=r"(cats|1000|n00000001|n01440764|n01443537) is no class of ImageNet-1k"):
        imagenet_folder(tmp_path)


def test_other_classes_are_numbered_in_natural_order(tmp_path):
    root = write_pictures(tmp_path, {"class10": [1], "class9": [2]})
    assert labelled(class_folder(root, 2)) == [(1, 1), (2, 0)]
    with pytest.raises(ValueError, match="has 2 class folders, the model has 3 classes"):
        class_folder(root, 3)


def test_pictures_are_resized_in_proportion_and_cropped_in_the_middle(tmp_path):
    # Black but for a white middle of 32 x 32, which the crop of 7/8 of the shorter side shows alone.
    (tmp_path / NUMBERS[0]).mkdir()
    picture = Image.new("RGB", (100, 48))
    picture.paste((255, 255, 255), (100 // 2 - 24, 0, 100 // 2 + 24, 48))
    picture.save(tmp_path / NUMBERS[0] / "x.png")
    for size in (28, 42, 84):
        assert labelled(imagenet_folder(tmp_path)[0], size) == [(255, 0)]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_picture_that_cannot_be_read_is_an_error_with_its_name(tmp_path, content):
    root = write_pictures(tmp_path, {NUMBERS[0]: [1, 2]})
    (root / NUMBERS[0] / "0.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a picture"):
        labelled(imagenet_folder(root)[0])


def test_a_folder_without_classes_or_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        imagenet_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no folders"):
        imagenet_folder(tmp_path)
    (tmp_path / NUMBERS[0]).mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        imagenet_folder(tmp_path)
