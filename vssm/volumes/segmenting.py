"""From files to files: read, predict, clean up, write, and count what was found; for one case or a folder of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .bundle import Bundle, default_bundle_path, find_bundle, load_bundle
from .cases import Case, case_name, find_cases
from .cleaning import clean_labels
from .digests import digest_files
from .errors import VolumeError
from .memory import enough_memory, fits_memory
from .predicting import mismatches, predict_volume
from .reading import SUFFIXES, read_volume
from .scratch import new_array
from .writing import check_output, read_description, write_labels, write_probabilities

# of the memory that is left, a half-precision probability map may take this part before it goes to disk
_PROBABILITIES_SHARE = 4


@dataclass(frozen=True)
class Settings:
    """How to predict and to clean up; `device`, `overlap`, `mirror` and `patch_size` as in `predict_volume`.

    Attributes:
        keep_largest: of each label keep only the largest connected component.
        min_size_ml: set connected components of less than this volume in ml to background.
    """

    device: str = "auto"
    overlap: float | None = None
    mirror: tuple[str, ...] = ()
    patch_size: tuple[int, int, int] | None = None
    keep_largest: bool = False
    min_size_ml: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_size_ml < float("inf"):
            raise VolumeError(f"the smallest size must be a volume in ml, 0 or more, got {self.min_size_ml:g}")


@dataclass(frozen=True)
class Segment:
    """One label of a result: its number, its name, how many voxels have it, and their volume in millilitres."""

    label: int
    name: str
    voxels: int
    millilitres: float


@dataclass(frozen=True)
class Segmentation:
    """What was written: the segments without the background, and what the reader should know."""

    segments: tuple[Segment, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CaseResult:
    """What became of one case of a folder.

    Attributes:
        name: of the case.
        output: its label map.
        segmentation: what was written, or None if nothing was.
        problem: why the case could not be segmented, or None; its files are then as they were.
    """

    name: str
    output: Path
    segmentation: Segmentation | None = None
    problem: str | None = None


def segment_file(
    image: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    bundle: str | Path | Sequence[str | Path] | None = None,
    overlay: str | Path | None = None,
    save_probabilities: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Segmentation:
    """Segment the volume `image` with a bundle and write its label map to `output`.

    Args:
        image: .nii or .nii.gz file; for a network of several input channels one each.
        output: .nii or .nii.gz file, replaced if it exists, with the exact grid of `image`.
        bundle: folder of a MONAI bundle, or the name of one that ships with vssm, or several of them whose
            probabilities are averaged; vssm's default one if None.
        overlay: .png file for a picture of three planes, or None.
        save_probabilities: also write `probabilities_path(output)`, see `write_probabilities`.
        progress: show a progress bar on standard error.
        settings: fields of `Settings`.

    Raises:
        VolumeError: one sentence; the label map is then as it was before, unless only a file beside it failed.
    """
    images = tuple(map(Path, _as_sequence(image)))
    case = Case(case_name(images[0]), images)
    _check_outputs(case, output, save_probabilities)
    if overlay is not None:
        check_output(overlay, (".png",))
    chosen = Settings(**settings)
    bundles = _load(bundle)
    with enough_memory(str(images[0])):
        return _segment(case, output, bundles, chosen, overlay, save_probabilities, progress)


def segment_folder(
    folder: str | Path,
    output: str | Path,
    *,
    bundle: str | Path | Sequence[str | Path] | None = None,
    save_probabilities: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Iterator[CaseResult]:
    """Segment every case of a folder (see `find_cases`) and write CASE.nii.gz for each into the folder `output`.

    A case whose result is complete and was made from the same images, bundles and settings is left alone, so that a run
    that was interrupted goes on where it stopped. A result made from others is a problem of that case unless
    `overwrite`. A case with a problem does not stop the others.

    Args:
        folder: of the volumes.
        output: folder for the results; it is made if its parent exists, and must not be `folder`.
        overwrite: segment again what has a result, and replace it.
        bundle, save_probabilities, progress, settings: see `segment_file`.

    Yields:
        CaseResult: one per case, sorted by name.

    Raises:
        VolumeError: nothing can be segmented at all: the folders, a bundle, the names of the files.
    """
    folder, output = Path(folder), Path(output)
    chosen = Settings(**settings)
    bundles = _load(bundle)
    cases = find_cases(folder, bundles[0].in_channels)
    _make_folder(output, folder)
    for case in tqdm(cases, unit="case", disable=not progress):
        result = output / f"{case.name}.nii.gz"
        try:
            if not overwrite and _is_done(case, result, bundles, chosen, save_probabilities):
                yield CaseResult(case.name, result)
                continue
            _check_outputs(case, result, save_probabilities)
            with enough_memory(str(case.images[0])):
                done = _segment(case, result, bundles, chosen, None, save_probabilities, progress)
        except VolumeError as error:
            yield CaseResult(case.name, result, problem=str(error))
        else:
            yield CaseResult(case.name, result, done)


def probabilities_path(output: str | Path) -> Path:
    """Where the probabilities that belong to the label map `output` are written: CASE.npz beside CASE.nii.gz."""
    output = Path(output)
    return output.with_name(f"{case_name(output)}.npz")


def _segment(
    case: Case,
    output: str | Path,
    bundles: tuple[Bundle, ...],
    settings: Settings,
    overlay: str | Path | None,
    save_probabilities: bool,
    progress: bool,
) -> Segmentation:
    if overlay is not None:
        # found missing before the work, not after it
        from .overlay import draw_overlay
    volumes = [read_volume(path) for path in case.images]
    description = _description(case, bundles, settings)
    volume, names, scratch = volumes[0], bundles[0].labels, Path(output).resolve().parent
    notes = [*(text for each in volumes for text in each.notes), *mismatches(volume, bundles[0])]
    probabilities = None
    if save_probabilities:
        shape = (len(names), *volume.voxels.shape)
        fits = fits_memory(_PROBABILITIES_SHARE * 2 * math.prod(shape))
        probabilities = new_array(shape, np.float16, None if fits else scratch)
    labels = predict_volume(
        volumes,
        bundles,
        device=settings.device,
        overlap=settings.overlap,
        mirror=settings.mirror,
        patch_size=settings.patch_size,
        scratch=scratch,
        probabilities=probabilities,
        progress=progress,
    )
    millilitres = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    if settings.keep_largest or settings.min_size_ml > 0:
        removed = clean_labels(
            labels, millilitres, keep_largest=settings.keep_largest, min_size_ml=settings.min_size_ml
        )
        notes.append(f"cleaning up set {removed} voxels ({removed * millilitres:.1f} ml) to background")
    write_labels(labels, volume, output, description)
    if probabilities is not None:
        write_probabilities(probabilities, volume, names, probabilities_path(output), description)
    if overlay is not None:
        draw_overlay(volume.voxels, labels, volume.affine, names, Path(overlay))
    counts = np.bincount(labels.ravel(), minlength=len(names))
    segments = tuple(
        Segment(label, name, int(counts[label]), float(counts[label] * millilitres))
        for label, name in enumerate(names)
        if label > 0
    )
    return Segmentation(segments, tuple(notes))


def _as_sequence(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return (paths,) if isinstance(paths, str | Path) else paths


def _load(bundle: str | Path | Sequence[str | Path] | None) -> tuple[Bundle, ...]:
    if bundle is None:
        return (load_bundle(default_bundle_path()),)
    return tuple(load_bundle(find_bundle(one)) for one in _as_sequence(bundle))


def _check_outputs(case: Case, output: str | Path, save_probabilities: bool) -> None:
    check_output(output, SUFFIXES, case.images)
    if save_probabilities:
        check_output(probabilities_path(output), (".npz",))


def _make_folder(output: Path, source: Path) -> None:
    try:
        output.mkdir(exist_ok=True)
        same = output.samefile(source)
    except FileExistsError:
        raise VolumeError(
            f"{output}: is a file; the results of a folder go into a folder, choose another name"
        ) from None
    except OSError as error:
        raise VolumeError(f"{output}: cannot be made ({error.strerror or error}); choose another folder") from None
    if same:
        raise VolumeError(f"{output}: is the folder of the images; choose another one for the results")


def _description(case: Case, bundles: tuple[Bundle, ...], settings: Settings) -> str:
    """For the results: tells equal images, bundles and settings from others, and nothing else of them."""
    # the device changes a result by rounding only
    words = {name: value for name, value in asdict(settings).items() if name != "device"}
    try:
        digest = digest_files(case.images, *(bundle.digest for bundle in bundles), repr(sorted(words.items())))
    except OSError as error:
        raise VolumeError(f"{case.images[0]}: cannot be read ({error.strerror or error}); check its name") from None
    return f"label map by vssm {digest[:32]}"


def _is_done(
    case: Case, result: Path, bundles: tuple[Bundle, ...], settings: Settings, save_probabilities: bool
) -> bool:
    """Whether the results of a case are there and complete; a damaged one is not.

    Raises:
        VolumeError: the result was made from something else.
    """
    try:
        found = read_volume(result).header["descrip"].item().decode("ascii", "replace")
    except VolumeError:
        return False
    description = _description(case, bundles, settings)
    if found != description:
        raise VolumeError(
            f"{result}: exists, but was made from other images, bundles or settings; add --overwrite or choose another "
            "folder for the results"
        )
    return not save_probabilities or read_description(probabilities_path(result)) == description
