# The authors have this configuration and publish no figures.
_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="msvmamba_nano", drop_path_rate=0.3, pretrained=True),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
