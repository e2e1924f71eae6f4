# The authors' file has the neck of another width and cannot run; no figures are published.
_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="efficientvmamba_tiny", drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(type="AmpOptimWrapper")
