"""A volume and its label maps as one HTML page that opens in any browser, offline.

The page holds everything: the volumes, the viewer (NiiVue, BSD-2-Clause, from the nilearn package) and three planes as
a picture, which is what browsers without WebGL 2 show.
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.util
import io
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

import nibabel
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .evaluation import check_same_grid, read_labels
from .reading import Volume, read_volume
from .writing import atomic_file

# More voxels than this are thinned out for the page; a browser's memory holds them several times.
_SHOWN_VOXELS = 48_000_000


def write_page(
    image: str | Path,
    output: str | Path,
    prediction: str | Path | None = None,
    reference: str | Path | None = None,
    names: Mapping[int, str] | None = None,
) -> list[str]:
    """Write the page.

    Args:
        image: NIfTI volume.
        output: the page; replaced if it exists.
        prediction, reference: label maps on the image's grid.
        names: label value -> name.

    Returns:
        remarks for the reader, one sentence each.

    Raises:
        VolumeError: a file cannot be read, the grids differ, or the page cannot be written.
    """
    volume = read_volume(image)
    maps = {}
    for role, path in (("prediction", prediction), ("reference", reference)):
        if path is not None:
            labelled = read_volume(path)
            check_same_grid(labelled, volume)
            maps[role] = read_labels(labelled)
    names = dict(names or {})
    present = sorted({int(label) for labels in maps.values() for label in np.unique(labels)} - {0})
    names |= {label: f"label {label}" for label in present if label not in names}
    colours = {label: _colour(place) for place, label in enumerate(sorted(names))}
    step = _step(volume.voxels.size)
    viewer = _viewer()
    notes = list(volume.notes)
    if step > 1:
        notes.append(f"the page shows one voxel in {step} along each axis; volumes and Dice count all of them")
    if viewer is None:
        notes.append("the installed nilearn ships no NiiVue; the page holds a picture instead of the viewer")
    page = Template(files("vssm.volumes").joinpath("assets/page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(volume.path.name),
        notes="".join(f"<p>{html.escape(note)}.</p>" for note in notes),
        rows=_rows(maps, names, colours, volume),
        picture=base64.b64encode(_picture(volume, maps, colours)).decode(),
        viewer=viewer or "",
        data=_data(volume, maps, names, colours, step),
    )
    with atomic_file(output) as stream:
        stream.write(page.encode())
    return notes


def _data(
    volume: Volume,
    maps: Mapping[str, np.ndarray],
    names: Mapping[int, str],
    colours: Mapping[int, list[int]],
    step: int,
) -> str:
    """What the page's script needs, as JSON that may stand inside an HTML element."""

    def encoded(array: np.ndarray) -> str:
        return _encoded(array[::step, ::step, ::step], volume.affine, step)

    content = {
        "image": encoded(_storable(volume.voxels)),
        "window": [float(value) for value in np.percentile(volume.voxels, (0.5, 99.8))],
        "maps": {role: encoded(_storable(labels)) for role, labels in maps.items()},
        "labels": [{"value": key, "name": names[key], "colour": colours[key]} for key in sorted(names)],
    }
    return json.dumps(content).replace("</", "<\\/")


def _step(voxels: int) -> int:
    step = 1
    while voxels / step**3 > _SHOWN_VOXELS:
        step += 1
    return step


def _colour(place: int) -> list[int]:
    """Red, green, blue of 0 to 255; neighbours in the list differ clearly."""
    return [round(255 * part) for part in colormaps["tab20"]((2 * place + place // 10) % 20)[:3]]


def _storable(voxels: np.ndarray) -> np.ndarray:
    """Whole numbers as int16 where they fit, for a smaller page; else as they are."""
    fits = np.abs(voxels).max() < 32767 and np.array_equal(voxels, np.rint(voxels))
    return voxels.astype(np.int16) if fits else voxels


def _encoded(array: np.ndarray, affine: np.ndarray, step: int) -> str:
    """A gzipped NIfTI file, base64."""
    thinned = affine @ np.diag([step, step, step, 1.0])
    file = nibabel.Nifti1Image(np.ascontiguousarray(array), thinned).to_bytes()
    return base64.b64encode(gzip.compress(file, compresslevel=6, mtime=0)).decode()


def _viewer() -> str | None:
    """NiiVue's source from nilearn, or None if this nilearn has none."""
    if importlib.util.find_spec("nilearn") is None:
        return None
    script = files("nilearn").joinpath("_assets/js/niivue.umd.js")
    if not script.is_file():
        return None
    return script.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _rows(
    maps: Mapping[str, np.ndarray], names: Mapping[int, str], colours: Mapping[int, list[int]], volume: Volume
) -> str:
    """Table rows: colour, name, predicted and reference volume, Dice."""
    voxel_ml = abs(np.linalg.det(volume.affine[:3, :3])) / 1000
    rows = []
    for label in sorted(names):
        masks = {role: labels == label for role, labels in maps.items()}
        millilitres = [
            f"{masks[role].sum() * voxel_ml:.2f}" if role in masks else "" for role in ("prediction", "reference")
        ]
        total = sum(int(mask.sum()) for mask in masks.values())
        both = len(masks) == 2 and total
        dice = f"{2 * np.logical_and(*masks.values()).sum() / total:.3f}" if both else ""
        swatch = "#{:02x}{:02x}{:02x}".format(*colours[label])
        cells = "".join(f"<td>{cell}</td>" for cell in (html.escape(names[label]), *millilitres, dice))
        rows.append(f'<tr><td><span style="background:{swatch}"></span></td>{cells}</tr>')
    return "".join(rows)


def _picture(volume: Volume, maps: Mapping[str, np.ndarray], colours: Mapping[int, list[int]]) -> bytes:
    """PNG: three planes through the middle of the labels, or of the volume, a row for each map."""
    labelled = [labels for labels in maps.values() if labels.any()]
    where = np.argwhere(labelled[0]).mean(0).round().astype(int) if labelled else np.array(volume.voxels.shape) // 2
    low, high = np.percentile(volume.voxels, (0.5, 99.8))
    rows = maps or {"": np.zeros(volume.voxels.shape, dtype=np.int32)}
    figure = Figure(figsize=(12, 4 * len(rows)), facecolor="black", layout="constrained")
    for (role, labels), line in zip(rows.items(), figure.subplots(len(rows), 3, squeeze=False), strict=True):
        for axis, panel in enumerate(line):
            grey, outline = (np.take(array, where[axis], axis=axis).T for array in (volume.voxels, labels))
            height, width = (volume.spacing[other] for other in (2 if axis < 2 else 1, 0 if axis else 1))
            panel.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=height / width)
            for label in np.unique(outline[outline > 0]):
                colour = [part / 255 for part in colours[int(label)]]
                panel.contour(outline == label, levels=[0.5], colors=[colour], linewidths=1.2)
            panel.set_title(role, color="white")
            panel.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return stream.getvalue()
