# Mask R-CNN, 12 epochs, as the papers train it: OpenMMLab's Swin configuration, whose backbone every row replaces.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
custom_imports = dict(imports=["vssm.integrations.openmmlab"], allow_failed_imports=False)
