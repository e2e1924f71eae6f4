# 60,000 iterations of batches of 32, the authors' pyramid, and the rates that their training script sets. In their code
# the decay over layers reaches the embeddings alone, for it matches names that the model does not have.
_base_ = "_base_/upernet_160k_ade20k.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="VSSMBackbone",
        name="vim_tiny",
        out_indices=(5, 11, 17, 23),
        out_norm=False,
        residual=False,
        class_token=False,
        global_pool="avg",
        img_size=512,
        drop_path_rate=0.1,
        pretrained=True,
    ),
    neck=dict(type="VimPyramid", channels=192),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.0002, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="VSSMLayerDecayConstructor",
    paramwise_cfg=dict(layer_decay=0.92),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=60000, val_interval=1000)
train_dataloader = dict(batch_size=8)
