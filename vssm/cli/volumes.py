"""`vssm segment`, `evaluate`, `view` and `export-bundle`: labels of volumes, how good they are, how they look."""

import argparse
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from .common import DISCLAIMER, CommandError, add_command, is_terminal, medical, note, print_table


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `segment`, `evaluate`, `view` and `export-bundle`."""
    segment = add_command(
        commands,
        _segment,
        "segment",
        "label the voxels of CT or MR volumes",
        "vssm segment T1.nii.gz -o tissue.nii.gz --overlay tissue.png; a folder with an ensemble, clean-up and "
        "probabilities: vssm segment scans/ -o results/ --bundle fold0 --bundle fold1 --mirror x --min-size 0.5 "
        "--save-probabilities; a network of two channels: vssm segment T1.nii.gz FLAIR.nii.gz -o lesions.nii.gz "
        "--bundle lesions",
        f"This is {DISCLAIMER}. The default bundle learned brain tissue from one template and is a demonstration. "
        "Of a folder, every .nii and .nii.gz file is a case; for a network of several channels CASE_0000.nii.gz, "
        "CASE_0001.nii.gz and so on are one. Run again, it goes on where it stopped: cases with a complete result of "
        "the same images, bundles and settings are skipped. A case that cannot be segmented is reported at the end, "
        "with status 2, and does not stop the others.",
    )
    segment.add_argument(
        "image", metavar="IMAGE", nargs="+", help="volume, .nii or .nii.gz; one for each channel; or a folder of them"
    )
    segment.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="label map, .nii or .nii.gz; replaced if it exists; for a folder of images a folder, made if needed",
    )
    segment.add_argument(
        "--bundle",
        action="append",
        help="folder of a MONAI bundle, or the name of one that ships with vssm (default: brain tissue); give it "
        "several times to average the probabilities of several folds",
    )
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is cuda, else cpu")
    segment.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to below 1 (default: the bundle's)")
    segment.add_argument(
        "--patch-size", type=int, nargs=3, metavar=("X", "Y", "Z"), help="of a window in voxels (default: the bundle's)"
    )
    segment.add_argument(
        "--mirror",
        nargs="+",
        default=(),
        choices=("x", "y", "z"),
        metavar="AXIS",
        help="average over windows mirrored along x, y, z of the network's grid; each axis doubles the time",
    )
    segment.add_argument(
        "--keep-largest", action="store_true", help="of each label keep the largest connected component only"
    )
    segment.add_argument(
        "--min-size", type=float, default=0.0, metavar="ML", help="remove connected components smaller than this, in ml"
    )
    segment.add_argument(
        "--save-probabilities",
        action="store_true",
        help="also write OUT with the ending .npz: probabilities (labels, X, Y, Z) as 16-bit floats, compressed, with "
        "affine and label names",
    )
    segment.add_argument("--overwrite", action="store_true", help="in a folder, also segment what has a result")
    segment.add_argument("--overlay", metavar="PNG", help="also draw three planes with contours; not for a folder")
    segment.add_argument("--quiet", action="store_true", help="print warnings and errors only")

    evaluate = add_command(
        commands,
        _evaluate,
        "evaluate",
        "rate label maps against a reference: Dice, surface Dice, Hausdorff distance, volumes, lesions",
        "vssm evaluate predictions/ references/ -o report/ --tolerance 2 --names 1=liver 2=tumour",
        "Folders are matched by file name. A label that is in neither map of a case is not rated there; one that is in "
        "one map only has Dice, surface Dice and lesion F1 of 0 and an infinite Hausdorff distance.",
    )
    evaluate.add_argument("predicted", metavar="PRED", help="label map (.nii, .nii.gz), or a folder of them")
    evaluate.add_argument("reference", metavar="REF", help="the reference, or a folder of references of the same names")
    evaluate.add_argument(
        "-o", "--output", metavar="FOLDER", help="also write cases.csv, summary.json and boxplot.png here"
    )
    evaluate.add_argument(
        "--tolerance", type=float, default=2.0, metavar="MM", help="of the surface Dice, in mm (default: %(default)s)"
    )
    evaluate.add_argument(
        "--names", nargs="+", default=(), metavar="LABEL=NAME", help="names of labels, for example 1=liver 2=tumour"
    )

    view = add_command(
        commands,
        _view,
        "view",
        "write a page that shows a volume with its labels in any browser, offline",
        "vssm view T1.nii.gz -o page.html --prediction tissue.nii.gz --names 1=grey 2=white",
    )
    view.add_argument("image", metavar="IMAGE", help="volume, .nii or .nii.gz")
    view.add_argument("-o", "--output", metavar="HTML", required=True, help="page to write; replaced if it exists")
    view.add_argument("--prediction", metavar="FILE", help="label map on the image's grid")
    view.add_argument("--reference", metavar="FILE", help="another, to compare with")
    view.add_argument("--names", nargs="+", default=(), metavar="LABEL=NAME", help="names of labels")

    export = add_command(
        commands,
        _export_bundle,
        "export-bundle",
        "write the network of a training run as a MONAI bundle",
        "vssm export-bundle runs/abdomen -o abdomen_bundle",
        "The bundle is checked. Bundles of 3-D networks also serve `vssm segment --bundle`.",
    )
    export.add_argument("run_folder", metavar="RUN", help="folder that tools/train_segmenter.py wrote")
    export.add_argument("-o", "--output", metavar="FOLDER", required=True, help="folder of the bundle")
    export.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which weights (default: %(default)s)"
    )


def _segment(options: argparse.Namespace) -> None:
    volumes = medical("vssm.volumes")
    if options.overlay is not None:
        medical("matplotlib")
    common = {
        "bundle": options.bundle,
        "device": options.device,
        "overlap": options.overlap,
        "mirror": tuple(options.mirror),
        "patch_size": options.patch_size and tuple(options.patch_size),
        "keep_largest": options.keep_largest,
        "min_size_ml": options.min_size,
        "save_probabilities": options.save_probabilities,
        "progress": not options.quiet and is_terminal(),
    }
    try:
        if any(_is_folder(image) for image in options.image):
            _segment_folder(volumes, options, common)
        else:
            _segment_file(volumes, options, common)
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    if not options.quiet:
        note(DISCLAIMER)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    # a name that the system cannot look up; reading it says so
    except OSError:
        return False


def _segment_file(volumes: ModuleType, options: argparse.Namespace, common: dict[str, Any]) -> None:
    start = time.perf_counter()
    result = volumes.segment_file(options.image, options.output, overlay=options.overlay, **common)
    for text in result.notes:
        note(text)
    if options.quiet:
        return
    print_table([("label", "name", "voxels", "ml"), *map(_row, result.segments)])
    written = [options.output]
    if options.save_probabilities:
        written.append(str(volumes.probabilities_path(options.output)))
    print(f"wrote {' and '.join(written)} in {time.perf_counter() - start:.1f} s")


def _segment_folder(volumes: ModuleType, options: argparse.Namespace, common: dict[str, Any]) -> None:
    if len(options.image) > 1:
        raise CommandError(
            f"give one folder, or files that are the channels of one case, got {len(options.image)} names"
        )
    (folder,) = options.image
    if options.output.lower().endswith((".nii", ".gz")):
        raise CommandError(f"{folder}: is a folder; its results go into a folder too, not into {options.output}")
    if options.overlay is not None:
        raise CommandError("--overlay draws one case; leave it out for a folder")
    rows, failed, skipped, cases = [], [], 0, 0
    for case in volumes.segment_folder(folder, options.output, overwrite=options.overwrite, **common):
        cases += 1
        if case.problem is not None:
            note(f"{case.name}: {' '.join(case.problem.split())}")
            failed.append(case.name)
        elif case.segmentation is None:
            note(f"{case.name}: skipped, {case.output} is complete")
            skipped += 1
        else:
            for text in case.segmentation.notes:
                note(f"{case.name}: {text}")
            rows += [(case.name, *_row(segment)) for segment in case.segmentation.segments]
    if not options.quiet:
        print_table([("case", "label", "name", "voxels", "ml"), *rows])
        print(f"wrote {cases - skipped - len(failed)} of {cases} cases to {options.output}, skipped {skipped}")
    if failed:
        raise CommandError(f"{len(failed)} of {cases} cases could not be segmented (see above): {', '.join(failed)}")


def _row(segment: Any) -> tuple[str, ...]:
    return str(segment.label), segment.name, str(segment.voxels), f"{segment.millilitres:.1f}"


def _evaluate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    volumes = medical("vssm.volumes")
    evaluation = medical("vssm.volumes.evaluation")
    names = dict(map(_label_name, options.names))
    if not 0 <= options.tolerance < float("inf"):
        raise CommandError(f"--tolerance must be a distance in mm, 0 or more, got {options.tolerance:g}")
    try:
        pairs = evaluation.pair_files(options.predicted, options.reference)
        ratings = []
        for predicted, reference in tqdm(pairs, unit="case", disable=not is_terminal() or len(pairs) == 1):
            ratings += evaluation.evaluate_files(predicted, reference, options.tolerance, names)
        if not ratings:
            raise CommandError(f"{options.reference}: neither the references nor the predictions hold a label but 0")
        summaries = evaluation.summarise(ratings)
        if options.output is not None:
            report = medical("vssm.volumes.evaluation_report")
            written = report.write_report(ratings, summaries, options.tolerance, options.output)
    except (volumes.VolumeError, OSError) as error:
        raise CommandError(str(error)) from None
    print_table(
        [
            ("label", "metric", "cases", "mean", "95 % from", "to", "median", "infinite"),
            *(
                (s.name, s.metric, *(f"{v:.4g}" for v in (s.cases, s.mean, s.low, s.high, s.median, s.infinite)))
                for s in summaries
            ),
        ]
    )
    if options.output is not None:
        print("wrote", ", ".join(map(str, written)))
    note(DISCLAIMER)


def _label_name(text: str) -> tuple[int, str]:
    label, _, name = text.partition("=")
    if not label.isdecimal() or int(label) == 0 or not name:
        raise CommandError(f"--names takes LABEL=NAME with a label of 1 or more, got {text!r}")
    return int(label), name


def _view(options: argparse.Namespace) -> None:
    volumes = medical("vssm.volumes")
    viewing = medical("vssm.volumes.viewing")
    names = dict(map(_label_name, options.names))
    try:
        volumes.check_output(options.output, (".html", ".htm"))
        remarks = viewing.write_page(options.image, options.output, options.prediction, options.reference, names)
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    for remark in remarks:
        note(remark)
    print(f"wrote {options.output}; open it in a browser")


def _export_bundle(options: argparse.Namespace) -> None:
    volumes = medical("vssm.volumes")
    exporting = medical("vssm.segmentation.exporting")
    try:
        folder = exporting.export_bundle(options.run_folder, options.output, options.checkpoint)
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    print(f"wrote {folder}; run it as {folder}/docs/README.md says")
    note(DISCLAIMER)
