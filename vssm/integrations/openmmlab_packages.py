"""OpenMMLab's packages, or the one sentence that says how to get those that fit."""

from importlib import import_module

_REMEDY = "run `make openmmlab` in a checkout of vssm, which installs versions that fit each other and this torch"


def require(*modules: str) -> None:
    """Import modules of OpenMMLab's packages.

    Raises:
        ImportError: one is missing, or does not fit the others or torch; the message says which and what to run.
    """
    for name in modules:
        try:
            import_module(name)
        # mmdet and mmseg assert the versions of the others; an mmcv built for another torch lacks symbols
        except (ImportError, AssertionError, AttributeError, OSError) as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
            kind = "is not installed" if absent else f"cannot be used ({' '.join(str(error).split())[:200]})"
            raise ImportError(f"{name.partition('.')[0]} {kind}; {_REMEDY}") from None
