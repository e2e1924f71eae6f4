# The authors have this configuration and publish no figures.
_base_ = "_base_/mask_rcnn_1x_coco.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="msvmamba_nano", drop_path_rate=0.2, pretrained=True),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
train_dataloader = dict(batch_size=4, num_workers=4)
