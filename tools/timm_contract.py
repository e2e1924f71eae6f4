"""Run timm's own tests/test_models.py on the models of vssm.

Example:
    git clone --depth 1 https://github.com/huggingface/pytorch-image-models ../timm
    python tools/timm_contract.py --timm ../timm

Every test of the file that takes a model name runs, on every name that fits --models, at timm's own sizes; also those
that timm reserves for a list of its own modules (forward_intermediates). Models whose features are tokens, not maps (no
pool_size in their configuration), are tested as timm tests its vision transformers. Left out: TorchScript, which vssm
does not support, and, without --download, the tests that fetch the published weights.
"""

import argparse
import sys
from pathlib import Path

import pytest
import timm

import vssm.models  # noqa: F401  registers the names


def restrict_registry(pattern: str) -> None:
    """Make timm.list_models and list_pretrained, which the test file calls at import, answer only with `pattern`."""
    list_models = timm.list_models
    of_tokens = [name for name in list_models(pattern) if timm.get_pretrained_cfg_value(name, "pool_size") is None]

    def completed(patterns):
        # The test file's list of models that are not convolutional pyramids names timm's vision transformers.
        if "vit_*" not in patterns:
            return patterns
        return [*patterns, *of_tokens, *(f"{name}.*" for name in of_tokens)]

    def restricted(filter="", module="", exclude_filters="", **options):
        # `module` is dropped: it names timm's own files.
        options["exclude_filters"] = completed(exclude_filters)
        ours = set(list_models(pattern, **options))
        return [name for name in list_models(completed(filter), **options) if name in ours]

    timm.list_models = restricted
    timm.list_pretrained = lambda filter="", exclude_filters="": restricted(
        filter, pretrained=True, exclude_filters=exclude_filters
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", type=Path, required=True, metavar="PATH", help="a checkout of pytorch-image-models")
    parser.add_argument("--models", default="vmamba*", metavar="PATTERN", help="names to test (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="also test the published weights (needs the network)")
    parser.add_argument(
        "pytest_args", nargs="*", metavar="-- ARG", help="passed on to pytest, e.g. -- -x --durations 5"
    )
    args = parser.parse_args()

    tests = args.timm / "tests" / "test_models.py"
    if not tests.is_file():
        parser.error(f"{tests} does not exist; --timm must be a checkout of pytorch-image-models")
    if not timm.list_models(args.models):
        parser.error(f"no registered model fits {args.models!r}")
    restrict_registry(args.models)
    chosen = "test_model_ and not torchscript and not inference"
    if not args.download:
        chosen += " and not pretrained"
    return pytest.main([str(tests), "-k", chosen, "-p", "no:cacheprovider", *args.pytest_args])


if __name__ == "__main__":
    sys.exit(main())
