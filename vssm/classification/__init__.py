"""Image classification: evaluating and training timm models on folders of images."""
