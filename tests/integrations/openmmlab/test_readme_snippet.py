"""The README's snippet for configurations of one's own runs as it is."""

import packages  # noqa: F401  skips without OpenMMLab
import readme


def test_the_backbone_is_built_from_the_root_registry():
    (snippet,) = [text for text in readme.snippets("Detection and segmentation") if "mmengine" in text]
    assert [level.shape[2:] for level in readme.run(snippet)["maps"]] == [(64, 80), (32, 40), (16, 20), (8, 10)]
