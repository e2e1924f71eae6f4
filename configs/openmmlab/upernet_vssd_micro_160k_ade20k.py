# The authors publish figures and no configuration; drop path is that of their detector.
_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(_delete_=True, type="VSSMBackbone", name="vssd_micro", drop_path_rate=0.1, pretrained=True),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
