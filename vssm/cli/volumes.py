"""`vssm segment`, `vssm evaluate` and `vssm view`: labels of CT and MR volumes, how good they are, how they look."""

import argparse
import time

from .common import DISCLAIMER, CommandError, add_command, is_terminal, medical, note, print_table


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare `segment`, `evaluate` and `view`."""
    segment = add_command(
        commands,
        _segment,
        "segment",
        "label the voxels of a CT or MR volume",
        "vssm segment T1.nii.gz -o tissue.nii.gz --overlay tissue.png",
        f"This is {DISCLAIMER}. The default bundle learned brain tissue from one template and is a demonstration.",
    )
    segment.add_argument("image", metavar="IMAGE", help="volume, .nii or .nii.gz")
    segment.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="label map, .nii or .nii.gz; replaced if it exists"
    )
    segment.add_argument(
        "--bundle", help="folder of a MONAI bundle, or the name of one that ships with vssm (default: brain tissue)"
    )
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; auto is cuda, else cpu")
    segment.add_argument("--overlap", type=float, help="of neighbouring windows, 0 to below 1 (default: the bundle's)")
    segment.add_argument("--overlay", metavar="PNG", help="also draw three planes with contours")
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


def _segment(options: argparse.Namespace) -> None:
    volumes = medical("vssm.volumes")
    if options.overlay is not None:
        medical("matplotlib")
    start = time.perf_counter()
    try:
        result = volumes.segment_file(
            options.image,
            options.output,
            bundle=options.bundle,
            device=options.device,
            overlap=options.overlap,
            overlay=options.overlay,
            progress=not options.quiet and is_terminal(),
        )
    except volumes.VolumeError as error:
        raise CommandError(str(error)) from None
    for text in result.notes:
        note(text)
    if options.quiet:
        return
    print_table(
        [
            ("label", "name", "voxels", "ml"),
            *((str(s.label), s.name, str(s.voxels), f"{s.millilitres:.1f}") for s in result.segments),
        ]
    )
    print(f"wrote {options.output} in {time.perf_counter() - start:.1f} s")
    note(DISCLAIMER)


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
