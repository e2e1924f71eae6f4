"""What timm promises of a vision transformer, on every vssm name that keeps one resolution, at small sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from families import ISOTROPIC, create, family, images

from vssm.checkpoint import load_official
from vssm.models.isotropic import class_first, class_in_the_middle, quarter_ends, resampled

every_isotropic = pytest.mark.parametrize("name", ISOTROPIC)


def grid_of(model, *size):
    return tuple((side - 16) // model.stride + 1 for side in size)


def spread_positions(model):
    """The model with positional embeddings large enough for tests to notice them."""
    torch.nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(3))
    return model


@every_isotropic
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooling_over_patches(name, pool):
    model, x = create(name, global_pool=pool, num_classes=3), images(2, 3, 64, 48)
    assert model(x).shape == (2, 3)
    patches = model.forward_features(x)[:, model.num_prefix_tokens :]
    mean, most = patches.mean(1), patches.amax(1)
    want = {"avg": mean, "max": most, "avgmax": (mean + most) / 2}[pool]
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), want)
    assert create(name, global_pool=pool, num_classes=0)(x).shape == (2, model.num_features)


@every_isotropic
def test_without_pooling_the_tokens_come_out(name):
    model = create(name, global_pool="", num_classes=0)
    x = images(2, 3, 64, 48)
    rows, columns = grid_of(model, 64, 48)
    assert model(x).shape == (2, rows * columns + model.num_prefix_tokens, model.num_features)
    assert torch.equal(model(x), model.forward_features(x))


@every_isotropic
def test_the_classifier_can_be_reset_and_removed(name):
    model, x = create(name), images(1, 3, 64, 64)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))
    model.reset_classifier(9)
    assert model(x).shape == (1, 9) and model.num_classes == 9 and model.get_classifier().out_features == 9
    assert torch.equal(model.forward_head(features, pre_logits=True), pre_logits)
    model.reset_classifier(4, "max")
    patches = features[:, model.num_prefix_tokens :]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), patches.amax(1))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert isinstance(model.get_classifier(), torch.nn.Identity)


@every_isotropic
@pytest.mark.parametrize("pool", ["median", "map"])
def test_pooling_that_the_model_lacks_is_refused_with_what_it_has(name, pool):
    model = create(name)
    model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match=f"global_pool is '{pool}'; this model has '', 'avg', 'max', 'avgmax'"):
        model.reset_classifier(3, pool)


@every_isotropic
@pytest.mark.parametrize("size", [(16, 16), (17, 47), (100, 37), (64, 61), (240, 256)])
def test_any_size_from_one_patch_up_without_resizing(name, size):
    model, x = spread_positions(create(name)), images(1, 3, *size)
    final, maps = model.forward_intermediates(x)
    grid = grid_of(model, *size)
    assert {tuple(m.shape) for m in maps} == {(1, model.num_features, *grid)}
    assert torch.isfinite(model.forward_head(final)).all()
    # Pixels that do not fill a patch at the bottom and right have no influence; all others have.
    seen = [(cells - 1) * model.stride + 16 for cells in grid]
    assert torch.equal(model(x[..., : seen[0], : seen[1]]), model(x))
    x.requires_grad_()
    model.forward_features(x).square().sum().backward()
    assert (x.grad[..., : seen[0], : seen[1]] != 0).all()


@every_isotropic
def test_wrong_images_are_refused_with_what_is_needed(name):
    model = create(name)
    small, gray, single = torch.zeros(1, 3, 15, 64), torch.zeros(1, 1, 64, 64), torch.zeros(3, 64, 64)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"at least 16 x 16 pixels, got 15 x 64; pad or resize to 16 x 64"):
            call(small)
        for wrong in (gray, single):
            with pytest.raises(ValueError, match=r"shape \(batch, 3, height, width\), got "):
                call(wrong)


@every_isotropic
def test_img_size_sets_the_grid_of_the_positions_and_can_be_changed(name):
    model, x = spread_positions(create(name, img_size=(64, 96))), images(1, 3, 80, 48)
    assert model.grid_size == grid_of(model, 64, 96)
    assert model.pos_embed.shape[1] == model.grid_size[0] * model.grid_size[1] + model.num_prefix_tokens
    want = model(x)
    model.set_input_size((80, 48))
    assert model.grid_size == grid_of(model, 80, 48) and model.pos_embed.requires_grad
    torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match=r"img_size must be at least the patch size 16, got \(8, 64\)"):
        create(name, img_size=(8, 64))


@every_isotropic
def test_a_fixed_image_size_refuses_others(name):
    model = create(name, img_size=(64, 96), dynamic_img_size=False)
    assert model(images(1, 3, 64, 96)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"images must be 64 x 96 pixels, got 64 x 97; .*dynamic_img_size=True"):
        model(images(1, 3, 64, 97))


def test_positions_are_resampled_on_their_grid_and_the_class_tokens_stays_in_the_middle():
    grid = torch.randn(1, 6, 5)
    token = torch.randn(1, 1, 5)
    square = grid.view(1, 2, 3, 5).permute(0, 3, 1, 2)
    want = F.interpolate(square, size=(4, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resampled(grid, (2, 3), (4, 5), 0), want)
    with_token = torch.cat([grid[:, :3], token, grid[:, 3:]], dim=1)
    got = resampled(with_token, (2, 3), (4, 5), 1)
    torch.testing.assert_close(got, torch.cat([want[:, :10], token, want[:, 10:]], dim=1))
    assert resampled(with_token, (2, 3), (2, 3), 1) is with_token
    # As many patches, in another shape.
    assert not torch.allclose(resampled(with_token, (2, 3), (3, 2), 1), with_token)


@pytest.mark.parametrize("patches", [1, 2, 3, 8, 9])
def test_the_class_token_stands_at_half_of_the_patches(patches):
    x = torch.arange(patches + 1.0).view(1, -1, 1)
    middle = patches // 2
    assert class_first(x)[0, :, 0].tolist() == [middle, *(i for i in range(patches + 1) if i != middle)]
    assert torch.equal(class_in_the_middle(class_first(x)), x)


@every_isotropic
def test_weights_of_another_square_grid_are_resampled_when_loaded(name):
    model = spread_positions(create(name, img_size=96))
    wide = create(name, seed=5, img_size=(64, 128))
    load_official(wide, model.state_dict())
    model.set_input_size((64, 128))
    assert torch.equal(wide.pos_embed, model.pos_embed)
    with pytest.raises(ValueError, match="pos_embed has shape"):
        load_official(create(name, img_size=96), wide.state_dict())


@every_isotropic
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 3), (2,), (-1,), (-3, -1), (3, 0), 2])
def test_features_only_gives_the_chosen_blocks_in_order(name, out_indices):
    x = images(1, 3, 64, 96)
    everything = create(name).forward_intermediates(x, intermediates_only=True)
    net = create(name, features_only=True, out_indices=out_indices)
    wanted = range(5 - out_indices, 5) if isinstance(out_indices, int) else out_indices
    maps = net(x)
    assert net.feature_info.channels() == [net.model.num_features] * len(maps)
    assert net.feature_info.reduction() == [net.model.stride] * len(maps)
    for i, got in zip(wanted, maps, strict=True):
        torch.testing.assert_close(got, everything[i])


@every_isotropic
def test_features_only_takes_the_ends_of_the_quarters_by_default(name):
    x = images(1, 3, 64, 64)
    everything = create(name).forward_intermediates(x, intermediates_only=True)
    for got, i in zip(create(name, features_only=True)(x), (1, 2, 3, 4), strict=True):
        torch.testing.assert_close(got, everything[i])


def test_the_ends_of_the_quarters_of_24_blocks_are_those_of_the_papers():
    assert quarter_ends(24) == (5, 11, 17, 23)
    assert quarter_ends(2) == (0, 1)
    assert quarter_ends(1) == (0,)


@every_isotropic
def test_a_traced_graph_gives_the_tokens_after_the_blocks(name):
    model, x = create(name), images(1, 3, 64, 48)
    net = create(name, features_only=True, feature_cls="fx", out_indices=(1, 4))
    want = model.forward_intermediates(x, (1, 4), output_fmt="NLC", intermediates_only=True)
    for got, patches in zip(net(x), want, strict=True):
        got = class_first(got)[:, 1:] if model.num_prefix_tokens else got
        torch.testing.assert_close(got, patches)


@every_isotropic
def test_intermediates_take_every_argument_of_timm(name):
    model, x = create(name), images(1, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and len(maps) == 5
    only = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(only, maps[3:], strict=True)] == [True, True]
    tokens = model.forward_intermediates(x, indices=[4, 1], output_fmt="NLC", intermediates_only=True)
    for got, i in zip(tokens, (4, 1), strict=True):
        assert torch.equal(got.transpose(1, 2).view(maps[i].shape), maps[i])
    normed = model.forward_intermediates(x, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed[4], final[:, model.num_prefix_tokens :])
    torch.testing.assert_close(normed[1], model.norm(tokens[1]))
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")


@every_isotropic
def test_the_class_token_comes_apart_from_the_map(name):
    model, x = create(name), images(1, 3, 64, 96)
    pairs = model.forward_intermediates(x, norm=True, return_prefix_tokens=True, intermediates_only=True)
    if model.num_prefix_tokens:
        fmap, token = pairs[-1]
        assert torch.equal(token, model.forward_features(x)[:, :1])
        assert fmap.shape == (1, model.num_features, *grid_of(model, 64, 96))
    else:
        assert pairs[-1].shape == (1, model.num_features, *grid_of(model, 64, 96))


@every_isotropic
def test_the_residual_stream_can_be_left_out(name):
    model, x = create(name), images(1, 3, 64, 96)
    stream = model.forward_intermediates(x, intermediates_only=True)
    added = model.forward_intermediates(x, residual=False, intermediates_only=True)
    for i in range(1, 5):
        torch.testing.assert_close(stream[i - 1] + added[i], stream[i])
    assert not torch.allclose(stream[0], added[0])


@every_isotropic
def test_checkpointed_intermediates_are_the_same(name):
    model, x = create(name).train(), images(1, 3, 64, 48)
    want = model.forward_intermediates(x, intermediates_only=True)
    model.set_grad_checkpointing()
    got = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(got, want)
    got[-1].sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@every_isotropic
def test_stopping_early_leaves_out_the_later_blocks(name):
    model, x = create(name), images(1, 3, 64, 96)
    calls = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda module, args, out: calls.append(module))
    final, maps = model.forward_intermediates(x, indices=[0, 1], stop_early=True, output_fmt="NLC")
    assert len(calls) == 2
    assert torch.equal(final[:, model.num_prefix_tokens :], model.norm(maps[1]))


@every_isotropic
def test_pruning_keeps_the_chosen_blocks_and_what_leads_there(name):
    model, x = create(name), images(1, 3, 64, 96)
    want = model.forward_intermediates(x, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2 and model.num_classes == 0
    assert torch.equal(model(x)[:, model.num_prefix_tokens :], want)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (1, 3)


@every_isotropic
def test_the_residual_stream_is_at_least_float32(name):
    model = create(name).bfloat16()
    final, maps = model.forward_intermediates(images(1, 3, 32, 32).bfloat16())
    assert final.dtype == torch.bfloat16 and {m.dtype for m in maps} == {torch.float32}
    maps = create(name).double().forward_intermediates(images(1, 3, 32, 32).double(), intermediates_only=True)
    assert {m.dtype for m in maps} == {torch.float64}


@every_isotropic
def test_stochastic_depth_grows_linearly_over_all_blocks(name):
    model = create(name, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(family(name).rates)


@every_isotropic
def test_in_training_dropped_blocks_leave_the_stream_as_it_is(name):
    model, x = create(name, drop_path_rate=1.0).train(), images(1, 3, 64, 48)
    # The last block is always dropped.
    torch.manual_seed(0)
    final, stream = model.forward_intermediates(x, output_fmt="NLC")
    assert torch.equal(stream[4], stream[3])
    torch.manual_seed(0)
    assert torch.equal(model.forward_features(x), final)
    added = model.forward_intermediates(x, [4], residual=False, intermediates_only=True)
    assert added[0].abs().max() > 0


@every_isotropic
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_are_stem_blocks_norm_and_head(name, coarse):
    model = create(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
    for key in dict(model.named_parameters()):
        part = key.split(".")
        number = {"blocks": int(part[1]) + 1 if part[0] == "blocks" else None, "norm": 5, "head": 6, "attn_pool": 6}
        assert groups[key] == number.get(part[0], 0), key


@every_isotropic
def test_initial_weights_are_the_official_ones(name):
    torch.manual_seed(0)
    model = timm.create_model(name, embed_dim=96, depth=4)
    assert model.patch_embed.weight.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.1)
    assert not model.patch_embed.bias.any() and not model.head.fc.bias.any()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    for block in model.blocks:
        # PyTorch's own range, +-1 / sqrt(inputs), divided by the root of the number of blocks.
        bound = (2 * 96) ** -0.5 / 2
        assert 0.95 * bound < block.mixer.out_proj.weight.abs().max() <= bound
        assert (block.norm.weight == 1).all() and block.norm.eps == 1e-5
    assert model.norm.eps == 1e-5
