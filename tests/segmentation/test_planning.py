"""Plans: nnU-Net's rules on known fingerprints, the memory they promise, and the file people edit."""

import dataclasses
import math

import pytest
import torch

from vssm.networks import UMambaBot
from vssm.segmentation.datasets import Case, Dataset
from vssm.segmentation.fingerprint import Fingerprint
from vssm.segmentation.planning import activation_bytes, check_plan, fitting_patch, make_plan, read_plan, write_plan

CASE = Case("a", (), "a.nii.gz")


def dataset(*channels):
    return Dataset("d", channels, ("background", "organ"), (dataclasses.replace(CASE, labels=_Path("a.nii.gz")),))


class _Path(str):
    @property
    def name(self):
        return str(self)


def fingerprint(shape, spacing, cases=20, zero_share=0.0, channels=1):
    one = [1.0] * channels
    return Fingerprint([list(shape)] * cases, [list(spacing)] * cases, one, one, one, one, zero_share, [cases, cases])


GIGABYTES = 10**9


def test_an_abdomen_ct_gets_nnunets_kind_of_plan():
    plan = make_plan(fingerprint((512, 512, 97), (0.8, 0.8, 2.5)), dataset("CT"), 11 * GIGABYTES, "bf16")
    assert plan.normalisation == "ct"
    assert plan.spacing == [0.8, 0.8, 2.5]
    assert plan.batch_size >= 2
    # the patch has fewer voxels along the thick axis and that axis is halved later
    assert plan.patch_size[2] < plan.patch_size[0] == plan.patch_size[1]
    assert plan.strides[:2] == [[1, 1, 1], [2, 2, 1]]
    assert plan.kernel_sizes[0] == [3, 3, 1]
    assert plan.kernel_sizes[-1] == [3, 3, 3]
    assert plan.features == [32, 64, 128, 256, 320, 320]


@pytest.mark.parametrize("shape, spacing", [((512, 512, 97), (0.8, 0.8, 2.5)), ((61, 73, 58), (1, 1, 1))])
@pytest.mark.parametrize("flat", [False, True])
def test_the_network_of_a_plan_takes_its_patches(shape, spacing, flat):
    plan = make_plan(fingerprint(shape, spacing), dataset("T1"), GIGABYTES // 2, flat=flat)
    for side, steps in zip(plan.network_size, zip(*plan.strides, strict=True), strict=True):
        assert side % math.prod(steps) == 0
        assert side // math.prod(steps) >= 4
    assert activation_bytes(plan.patch_size, plan.spacing, 2, "no", 2) <= GIGABYTES // 2
    assert plan.is_flat == flat


def test_a_patch_that_is_given_is_kept_and_its_odd_axes_are_not_halved():
    plan = make_plan(
        fingerprint((60, 60, 60), (1, 1, 1)), dataset("T1"), GIGABYTES, patch_size=[18, 16, 32], batch_size=3
    )
    assert (plan.patch_size, plan.batch_size) == ([18, 16, 32], 3)
    assert [math.prod(steps) for steps in zip(*plan.strides, strict=True)] == [2, 4, 8]


def test_thick_slices_take_the_finer_spacing_of_the_dataset():
    thick = fingerprint((320, 320, 20), (1, 1, 6))
    thick.spacings[:4] = [[1, 1, 4]] * 4
    assert make_plan(thick, dataset("MR"), GIGABYTES).spacing == [1, 1, 4]


def test_more_memory_gives_larger_batches_or_patches_and_too_little_is_refused():
    data = fingerprint((160, 160, 160), (1, 1, 1))
    small, large = (make_plan(data, dataset("MR"), memory * GIGABYTES) for memory in (1, 8))
    assert math.prod(small.patch_size) * small.batch_size < math.prod(large.patch_size) * large.batch_size
    with pytest.raises(ValueError, match="memory_gb"):
        make_plan(data, dataset("MR"), 1000)


@pytest.mark.parametrize("patch", [(16, 24, 24), (32, 32, 1)])
def test_the_memory_estimate_covers_what_autograd_keeps_and_is_not_twice_as_much(patch):
    plan = make_plan(
        fingerprint((32, 32, 32), (1, 1, 1)), dataset("MR"), GIGABYTES, flat=patch[2] == 1, patch_size=patch
    )
    shape = {
        key: getattr(plan, key) for key in ("features", "strides", "kernel_sizes", "num_blocks", "num_decoder_blocks")
    }
    network = UMambaBot(plan.spatial_dims, 1, 2, **shape)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(torch.zeros(1, 1, *plan.network_size))
    assert result.requires_grad
    measured = sum(size for size, _ in kept.values())
    assert measured < activation_bytes(patch, plan.spacing, 1, "no", 2) < 2 * measured


def test_a_patch_that_fits_is_smaller_by_the_share_and_still_divisible():
    plan = make_plan(fingerprint((160, 160, 160), (1, 1, 1)), dataset("MR"), 4 * GIGABYTES)
    patch = fitting_patch(plan, 0.5)
    assert math.prod(patch) <= 0.5 * math.prod(plan.patch_size)
    for side, steps in zip(patch, zip(*plan.strides, strict=True), strict=True):
        assert side % math.prod(steps) == 0


def test_an_edited_plan_is_read_back_and_checked(tmp_path):
    mr = dataset("MR")
    plan = make_plan(fingerprint((60, 60, 60), (1, 1, 1), zero_share=0.5), mr, GIGABYTES)
    assert plan.normalisation == "zscore_nonzero"
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml", mr) == plan
    text = (tmp_path / "plan.yaml").read_text()
    assert "zscore_nonzero: the same over the voxels" in text
    (tmp_path / "plan.yaml").write_text(text.replace(f"batch_size: {plan.batch_size}", "batch_size: 7"))
    assert read_plan(tmp_path / "plan.yaml", mr).batch_size == 7
    (tmp_path / "plan.yaml").write_text(text.replace("batch_size", "batchsize"))
    with pytest.raises(ValueError, match="unknown option batchsize"):
        read_plan(tmp_path / "plan.yaml", mr)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"intensity_mean": [1.0, 2.0]}, "intensity_mean has 2 entries, the dataset 1 channels"),
        ({"num_blocks": [1]}, "num_blocks has 1 entries"),
        ({"patch_size": [8, 8]}, "patch_size"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, words):
    mr = dataset("MR")
    plan = make_plan(fingerprint((60, 60, 60), (1, 1, 1)), mr, GIGABYTES)
    with pytest.raises(ValueError, match=words):
        check_plan(dataclasses.replace(plan, **change), mr)
    with pytest.raises(ValueError, match="choose one of ct"):
        dataclasses.replace(plan, normalisation="none")
