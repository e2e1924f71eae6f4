"""Checkpoint files made to do harm: each is refused with its name, nothing of it runs, nothing is written."""

import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch

from vssm.checkpoint import read_checkpoint

VICTIM = "victim.txt"
COMMAND = f"echo x > {VICTIM}"
CODE = f"open('{VICTIM}', 'w')"
WEIGHTS = {"fc.weight": torch.arange(6.0).view(2, 3)}


class Call:
    """Pickled as a call of `function`, an object or the text "module name"."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def as_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def calls(function: bytes, *arguments: bytes) -> bytes:
    """The opcodes of function(*arguments)."""
    return function + b"(" + b"".join(arguments) + b"tR"


def program(body: bytes) -> bytes:
    """A pickle of {"model": whatever the opcodes leave}."""
    return b"\x80\x02}" + text("model") + body + b"s."


def in_zip(data: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A file as torch.save lays it out, with that pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for path, content in more.items():
            archive.writestr(path, content)
    return stream.getvalue()


def good_zip(compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """Good weights, and more entries in their archive."""
    stream = io.BytesIO(saved({"model": WEIGHTS}))
    with zipfile.ZipFile(stream, "a", compression) as archive:
        for path, content in more.items():
            archive.writestr(path, content)
    return stream.getvalue()


def saved(value: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


SYSTEM = calls(as_global("os", "system"), text(COMMAND))
GETATTR = as_global("__builtin__", "getattr")
IMPORT = as_global("__builtin__", "__import__")
FILE_OF_CODE = "code.py"

PROGRAMS = {
    "os.system": SYSTEM,
    "posix.system": calls(as_global("posix", "system"), text(COMMAND)),
    "nt.system": calls(as_global("nt", "system"), text(COMMAND)),
    "os.popen": calls(as_global("os", "popen"), text(COMMAND)),
    "subprocess": calls(as_global("subprocess", "getoutput"), text(COMMAND)),
    "eval": calls(as_global("__builtin__", "eval"), text(CODE)),
    "exec in Python 3's name": calls(as_global("builtins", "exec"), text(CODE)),
    "import": calls(IMPORT, text("antigravity")),
    "importlib": calls(as_global("importlib", "import_module"), text("this")),
    "getattr of a module": calls(calls(GETATTR, calls(IMPORT, text("os")), text("system")), text(COMMAND)),
    "getattr chain from an allowed class": calls(
        calls(GETATTR, calls(GETATTR, as_global("torch", "Tensor"), text("__init__")), text("__globals__")), text("os")
    ),
    "getattr twice, then call": calls(
        calls(GETATTR, calls(GETATTR, as_global("torch._utils", "_rebuild_tensor"), text("__globals__")), text("get"))
    ),
    "dotted name": calls(as_global("torch", "serialization.os.system"), text(COMMAND)),
    "attrgetter": calls(
        calls(as_global("operator", "attrgetter"), text("os.system")), as_global("torch", "serialization")
    ),
    "partial": calls(calls(as_global("functools", "partial"), as_global("os", "system"), text(COMMAND))),
    "runpy": calls(as_global("runpy", "run_path"), text(FILE_OF_CODE)),
    "pickle in a pickle": calls(as_global("pickle", "loads"), text("\x80\x02" + COMMAND)),
    "torch.load without limits": calls(as_global("torch", "load"), text(FILE_OF_CODE)),
    "torch.hub": calls(as_global("torch.hub", "load"), text("nobody/nothing"), text("x")),
    "numpy's exec": calls(as_global("numpy.testing._private.utils", "runstring"), text(CODE), b"}"),
    "ctypes": calls(as_global("ctypes", "CDLL"), text("libc.so.6")),
    "rmtree": calls(as_global("shutil", "rmtree"), text(".")),
    "open for writing": calls(as_global("io", "open"), text(VICTIM), text("w")),
    "code object": calls(as_global("types", "CodeType")),
    "class of torch.nn": calls(as_global("torch.nn.modules.linear", "Linear")),
    "stand-in called as a function": calls(calls(as_global("argparse", "Namespace")), text(COMMAND)),
    "attributes of a Namespace": calls(as_global("argparse", "Namespace")) + b"}" + text("x") + SYSTEM + b"sb",
    "entry of a CfgNode": calls(as_global("yacs.config", "CfgNode")) + text("x") + SYSTEM + b"s",
    "state of a HistoryBuffer": calls(as_global("mmengine.logging.history_buffer", "HistoryBuffer")) + SYSTEM + b"b",
    "deep in lists": b"(l" * 50 + SYSTEM + b"a" * 50,
    "new object": as_global("subprocess", "Popen") + b"(" + text(COMMAND) + b"t\x81",
    "INST opcode": b"(" + text(COMMAND) + b"ios\nsystem\n",
    "OBJ opcode": b"(" + as_global("os", "system") + text(COMMAND) + b"o",
    "STACK_GLOBAL opcode": text("os") + text("system") + b"\x93(" + text(COMMAND) + b"tR",
    "extension registry": b"\x82\x01(tR",
    "persistent id": b"(" + text("not storage") + SYSTEM + b"tQ",
    "bytearray of a petabyte": calls(
        as_global("__builtin__", "bytearray"), b"\x8a\x07" + (10**15).to_bytes(7, "little")
    ),
    "memo that is not there": b"j\xff\xff\xff\x7f",
}

FILES = {
    "pickled call": saved({"model": Call(os.system, COMMAND)}),
    "pickled call in the old format": saved({"model": Call(os.system, COMMAND)}, zipped=False),
    "pickled module": saved({"model": torch.nn.Linear(1, 1)}),
    "second program after the first": saved({"model": {}}, zipped=False) + program(SYSTEM),
    "protocol 5": pickle.dumps({"model": Call(os.system, COMMAND)}, protocol=5),
    "TorchScript": in_zip(
        program(SYSTEM), **{"archive/code/__torch__.py": CODE.encode(), "archive/constants.pkl": b"."}
    ),
    "path out of the folder": good_zip(**{f"../{VICTIM}": b"x"}),
    "absolute path": good_zip(**{f"/{VICTIM}": b"x"}),
    "Windows path": good_zip(**{f"..\\{VICTIM}": b"x"}),
    "zip bomb": good_zip(zipfile.ZIP_DEFLATED, **{"archive/data/9": bytes(50_000_000)}),
    "zip bomb as the pickle": in_zip(b"\x80\x02" + b"(" * 50_000_000, compression=zipfile.ZIP_DEFLATED),
}


def tar_file(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


FILES["oldest format, path out of the folder"] = tar_file((f"../{VICTIM}", b"x"), ("pickle", program(SYSTEM)))
FILES["oldest format with storages"] = tar_file(
    ("storages", program(SYSTEM)), ("tensors", b""), ("pickle", program(SYSTEM)), (f"../{VICTIM}", b"x")
)


def overlapping() -> bytes:
    """A zip file whose directory names the same megabyte a thousand times."""
    whole = bytearray(good_zip(**{"archive/data/9": bytes(1_000_000)}))
    end = whole.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", whole, end + 16)[0]
    entry = whole[whole.rindex(b"PK\x01\x02", start, end) : end]
    body = whole[:end] + entry * 999
    size = len(body) - start
    count = struct.unpack_from("<H", whole, end + 10)[0] + 999
    return bytes(body + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0))


FILES["overlapping zip entries"] = overlapping()


def snapshot(folder) -> dict:
    return {str(path): zlib.crc32(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(content) -> what is read from a file evil.pth of that content; whatever happens, nothing may be written."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (inner / FILE_OF_CODE).write_text(CODE)

    def call(content: bytes):
        (inner / "evil.pth").write_bytes(content)
        before = snapshot(tmp_path)
        try:
            return read_checkpoint("evil.pth")
        finally:
            assert snapshot(tmp_path) == before
            assert not os.path.exists(os.path.join(os.sep, VICTIM))

    return call


REFUSED = r"^evil\.pth (is damaged or not a checkpoint|names the global)"


def test_harmless_files_of_the_same_making_are_read(read):
    one = as_global("torch._utils", "_rebuild_meta_tensor_no_storage")
    tensor = calls(one, as_global("torch", "float32"), b"K\x02\x85", b"K\x01\x85", b"\x89")
    assert read(in_zip(program(b"}" + text("a") + tensor + b"s")))["a"].shape == (2,)
    assert torch.equal(read(good_zip())["fc.weight"], WEIGHTS["fc.weight"])


def test_an_entry_that_names_a_place_outside_is_not_unpacked(read):
    assert torch.equal(read(good_zip(**{f"archive/../../{VICTIM}": b"x"}))["fc.weight"], WEIGHTS["fc.weight"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_refused_and_does_not_run(name, zipped, read):
    code = program(PROGRAMS[name])
    # Python's own reader understands it: it is an attack, not a damaged file.
    list(pickletools.genops(code))
    with pytest.raises(ValueError, match=REFUSED):
        read(in_zip(code) if zipped else code)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_and_does_not_run(name, read):
    with pytest.raises(ValueError, match=REFUSED):
        read(FILES[name])


def test_the_attacks_would_run_where_pickles_are_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "eval", "getattr of a module", "INST opcode", "OBJ opcode", "STACK_GLOBAL opcode"):
        pickle.loads(program(PROGRAMS[name]))
        os.unlink(VICTIM)
    torch.load(io.BytesIO(FILES["pickled call"]), weights_only=False)
    assert os.path.exists(VICTIM)
