# Four maps of stride 16 from the quarters of the depth, without a pyramid, as the authors have it.
_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="VSSMBackbone",
        name="lbvim_528",
        out_indices=(5, 11, 17, 23),
        residual=False,
        out_channels=384,
        img_size=512,
        pretrained=True,
    ),
    decode_head=dict(in_channels=[384] * 4),
    auxiliary_head=dict(in_channels=384),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "pos_embed": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "A_log": dict(decay_mult=0.0),
            ".D": dict(decay_mult=0.0),
        }
    )
)
