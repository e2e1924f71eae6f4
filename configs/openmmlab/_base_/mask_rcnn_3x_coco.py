# Mask R-CNN, 36 epochs at several scales, as the papers train it: OpenMMLab's Swin configuration with another backbone.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["vssm.integrations.openmmlab"], allow_failed_imports=False)
