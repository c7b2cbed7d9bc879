"""Untrusted files: data are read, code is refused by name and not run, and memory stays bounded."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from ezhoi_diffusion.guide.formats import read_guide_file
from ezhoi_diffusion.guide.reading import GuideFileError, UnsafeFileError, read_untrusted, to_tensor


def save_new(value, file):
    torch.save(value, file)


def save_old(value, file):
    torch.save(value, file, _use_new_zipfile_serialization=False)


WRITERS = {f"pickle{n}": (lambda value, file, n=n: pickle.dump(value, file, protocol=n)) for n in range(2, 6)}
WRITERS |= {"torch": save_new, "torch-old": save_old}


def write(path: Path, value, how: str = "pickle4") -> Path:
    with path.open("wb") as file:
        WRITERS[how](value, file)
    return path


@pytest.mark.parametrize("how", WRITERS)
def test_tensors_and_containers_are_read(tmp_path, how):
    base = torch.randn(6, 4)
    state = OrderedDict(w=base)
    state._metadata = {"": {"version": 1}}
    value = {
        "plain": base,
        "grad": base.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(base),
        "view": base[::2, 1:],
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "long": torch.arange(5),
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "state": state,
        "counter": Counter({1: 2}),
        "size": base.shape,
        "words": ["a", "b"],
        "set": {1, 2},
        "nested": {"x": [1, 2.5, None, True, (1, 2)], 3: b"\x00\xff"},
    }
    found = read_untrusted(write(tmp_path / "f", value, how))
    assert found.keys() == value.keys()
    for name in ("plain", "grad", "parameter", "view", "half", "bfloat", "long", "scalar", "none"):
        assert torch.equal(to_tensor(found[name]), value[name].detach()), name
        assert not to_tensor(found[name]).requires_grad
    assert torch.equal(found["state"]["w"], base)
    assert found["counter"] == {1: 2}
    assert tuple(found["size"]) == (6, 4)
    assert (found["words"], found["set"], found["nested"]) == (value["words"], value["set"], value["nested"])


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_both_numpy_versions_are_read(tmp_path, protocol, module):
    value = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3),
        "f": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
        "big": np.arange(3, dtype=">f4"),
        "words": np.array(["ride", "hold"]),
        "scalar": np.float64(0.5),
        "empty": np.zeros((0, 7)),
    }
    data = pickle.dumps(value, protocol)
    own, other = b"numpy._core", module.encode()
    if own not in data:
        own = b"numpy.core"
    counted = protocol >= 4  # then names are counted strings
    data = b"".join(_renamed(data, own.decode(), module)) if counted else data.replace(own, other)
    (tmp_path / "f").write_bytes(data)
    found = read_untrusted(tmp_path / "f")
    for name in ("c", "f", "big", "words", "empty"):
        assert np.array_equal(found[name], value[name]), name
    assert found["scalar"] == 0.5
    assert torch.equal(to_tensor(found["big"]), torch.arange(3.0))


def _renamed(data: bytes, old: str, new: str):
    """A protocol 4 or 5 pickle with module names exchanged, its frames taken off."""
    positions = [*((op, arg, pos) for op, arg, pos in pickletools.genops(data)), (None, None, len(data))]
    for (op, arg, start), (_, _, end) in itertools.pairwise(positions):
        if op.name == "FRAME":
            continue
        if op.name == "SHORT_BINUNICODE" and isinstance(arg, str) and arg.startswith(old):
            text = arg.replace(old, new).encode()
            yield pickle.SHORT_BINUNICODE + bytes([len(text)]) + text
        else:
            yield data[start:end]


def test_tensors_of_a_gpu_are_read_on_the_cpu(tmp_path):
    """No GPU is needed: only the location in the file matters."""
    data = pickle.dumps({"mean": torch.ones(3)})
    inner_old = io.BytesIO()
    save_old(torch.ones(3).untyped_storage(), inner_old)
    moved = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    grown = len(moved) - len(data)
    assert grown == 3
    # the inner file is a counted string in the outer one, which is framed
    start = data.index(b"\x80\x02\x8a\nl\xfc\x9cF")
    size = data[start - 5 : start]
    assert size[:1] == b"B", "pickle writes it as BINBYTES"
    counted = b"B" + struct.pack("<I", struct.unpack("<I", size[1:])[0] + grown)
    frame = struct.unpack("<Q", data[3:11])[0]
    moved = moved[:3] + struct.pack("<Q", frame + grown) + moved[11 : start - 5] + counted + moved[start:]
    (tmp_path / "f").write_bytes(moved)
    found = read_untrusted(tmp_path / "f")["mean"]
    assert found.device.type == "cpu"
    assert torch.equal(found, torch.ones(3))


class System:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Eval(System):
    def __reduce__(self):
        return eval, (f"open({str(self.canary)!r}, 'w')",)


class Getattr(System):
    def __reduce__(self):
        return getattr, ("", "join")


class Custom:
    def __setstate__(self, state):
        Path(state["canary"]).touch()


class Nested(System):
    """Hides in the bytes of what looks like a tensor's data."""

    def __reduce__(self):
        file = io.BytesIO()
        save_old(System(self.canary), file)
        return torch.storage._load_from_bytes, (file.getvalue(),)


class NestedPlain(System):
    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(System(self.canary)),)


class Load(System):
    """numpy.load runs pickles."""

    def __reduce__(self):
        return np.load, (str(self.canary), None, True)


@pytest.mark.parametrize("how", ["pickle2", "pickle4", "torch", "torch-old"])
@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (System, "posix.system"), (Eval, "__?builtins?__.eval|builtins.eval"), (Getattr, "getattr"), (Load, "numpy.load"),
        (Nested, r"posix\.system|_load_from_bytes"), (NestedPlain, "no torch file|_load_from_bytes"),
    ],
)  # fmt: skip
def test_code_is_refused_by_name_and_not_run(tmp_path, how, evil, named):
    canary = tmp_path / "canary"
    path = write(tmp_path / "mean.pkl", {"text_mean": torch.ones(4), "x": evil(canary)}, how)
    with pytest.raises(GuideFileError, match=named) as refused:
        read_untrusted(path)
    assert str(path) in str(refused.value)
    if evil is not NestedPlain or how.startswith("torch"):
        assert isinstance(refused.value, UnsafeFileError)
        assert "nothing of it was run" in str(refused.value)
    assert not canary.exists()


@pytest.mark.parametrize("how", WRITERS)
def test_objects_of_other_classes_are_refused(tmp_path, how):
    value = Custom()
    value.canary = str(tmp_path / "canary")
    with pytest.raises(UnsafeFileError, match=r"Custom|copyreg|copy_reg"):
        read_untrusted(write(tmp_path / "f", [value], how))
    assert not (tmp_path / "canary").exists()


def test_pickle_itself_would_run_the_code(tmp_path):
    pickle.loads(pickle.dumps(System(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "program",
    [
        # a list of 2**62 bytes, as bytes, as bytearray, as text
        b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        b"\x80\x05\x8d" + struct.pack("<Q", 2**40) + b"x.",
        # bytearray(2**40)
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        # an array of 2**40 numbers, made first and filled later
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85c_codecs\nencode\n"
        b"X\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87R.",
        # numpy.ndarray((2**40,))
        b"\x80\x02cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85\x85R.",
        # a doubling tuple as a key: 2**200 hashes
        b"\x80\x02}" + b"K\x01" + b"2\x86" * 200 + b"K\x01s.",
        # a tuple nested so deeply that its hash overflows the stack
        b"\x80\x02}" + b"K\x01" + b"\x85" * 1_000_000 + b"K\x01s.",
        b"\x80\x04\x8f(" + b"K\x01" + b"\x85" * 1_000_000 + b"\x90.",
        b"\x80\x04(" + b"K\x01" + b"\x85" * 1_000_000 + b"\x91.",
        # one megabyte of a tensor, a thousand times
        b"\x80\x04B" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"\x94(" + b"cbuiltins\nbytearray\nh\x00\x85R" * 1000 + b"t.",
        # attributes of what is shared by all
        b"\x80\x02cnumpy\ndtype\nN}X\x09\x00\x00\x00set_stateNs\x86b.",
        b"\x80\x02ctorch\nfloat32\n}X\x01\x00\x00\x00aNsb.",
        b"\x80\x04\x82\x01.",
        b"\x80\x02U\x07storageq\x00Q.",
        b"\x80\x02]\x85\x85\x93.",
    ],
)  # fmt: skip
def test_bombs_are_refused_quickly(tmp_path, program):
    (tmp_path / "f").write_bytes(program)
    with pytest.raises(GuideFileError, match="f"):
        read_untrusted(tmp_path / "f")


def test_a_large_memo_index_takes_no_memory(tmp_path):
    """C's pickle would make a table of 64 GB."""
    (tmp_path / "f").write_bytes(b"\x80\x04]r\xff\xff\xff\xff.")
    assert read_untrusted(tmp_path / "f") == []


def test_deep_nesting_alone_is_read(tmp_path):
    (tmp_path / "f").write_bytes(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    assert isinstance(read_untrusted(tmp_path / "f"), list)


def test_arrays_that_do_not_fit_their_bytes_are_refused(tmp_path):
    data = pickle.dumps(np.zeros((7, 11), np.float32), protocol=4)
    (tmp_path / "f").write_bytes(data.replace(b"K\x07K\x0b", b"K\x08K\x0b"))
    with pytest.raises(GuideFileError, match=r"\[8, 11\] does not fit its 308 bytes"):
        read_untrusted(tmp_path / "f")


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(GuideFileError, match="neither numbers nor text"):
        read_untrusted(write(tmp_path / "f", np.array([System(tmp_path / "canary")], dtype=object)))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("how", ["pickle2", "torch", "torch-old"])
def test_tensors_that_claim_more_than_is_stored_are_refused(tmp_path, how):
    """The shape [7, 11] becomes [8, 11] where the file says it; torch would make room for it."""
    path = write(tmp_path / "f", {"mean": torch.zeros(7, 11)}, how)
    if how == "torch":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(b"K\x07K\x0b\x86", b"K\x08K\x0b\x86"))
    else:
        path.write_bytes(path.read_bytes().replace(b"K\x07K\x0b\x86", b"K\x08K\x0b\x86"))
    with pytest.raises(GuideFileError, match=r"\[8, 11\] claims more than the 77 numbers"):
        read_untrusted(path)


@pytest.mark.parametrize("how", ["torch", "torch-old"])
def test_storages_that_claim_more_than_the_file_has_are_refused(tmp_path, how):
    path = write(tmp_path / "f", {"mean": torch.zeros(77)}, how)
    claim, more = b"K\x4d", b"J\xff\xff\xff\x7f"  # 77 numbers, 2**31 - 1
    if how == "torch":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(claim, more, 1) if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(path.read_bytes().replace(claim, more, 1))
    with pytest.raises(GuideFileError, match="claim"):
        read_untrusted(path)


def test_compressed_archives_are_refused(tmp_path):
    path = write(tmp_path / "f", torch.zeros(1 << 20), "torch")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 100_000
    with pytest.raises(GuideFileError, match="compressed"):
        read_untrusted(path)


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_truncated_files_raise_one_typed_error(tmp_path, how, share):
    path = write(tmp_path / "f", {"mean": torch.randn(40, 40), "words": ["a"] * 50}, how)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(GuideFileError, match=str(path)):
        read_untrusted(path)
    assert path.read_bytes() == data[: int(share * len(data))]


@pytest.mark.parametrize("how", WRITERS)
def test_flipped_bits_raise_a_typed_error_or_give_data(tmp_path, how):
    """A plain pickle has no checksum, so a flip in a number cannot be seen; anything else must be a typed error."""
    path = write(tmp_path / "f", {"mean": torch.randn(8), "words": ["a"] * 5, "n": np.zeros(3)} if "pickle" in how else {"m": torch.randn(8)}, how)  # fmt: skip
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(data)
        changed[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with suppress(GuideFileError):
            read_untrusted(path)
        with suppress(GuideFileError):
            read_guide_file(path)


def test_a_flip_in_the_data_of_a_torch_file_is_found(tmp_path):
    path = write(tmp_path / "f", torch.arange(1000.0), "torch")
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 500.0))] ^= 4
    path.write_bytes(data)
    with pytest.raises(GuideFileError, match=r"damaged.*CRC-32"):
        read_untrusted(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty .0 bytes.: the program that wrote it crashed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "neither a pickle nor a torch file"),
        (b"\x1f\x8b\x08\x00", "neither a pickle nor a torch file"),
        (b"<!DOCTYPE html>", "neither"),
        (pickle.dumps({"a": 1}) + b"more", "4 bytes after its end"),
    ],
)
def test_errors_say_what_other_files_are(tmp_path, content, says):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(GuideFileError, match=says):
        read_untrusted(tmp_path / "f")


def test_missing_files_folders_and_files_larger_than_memory_are_refused(tmp_path, mocker):
    with pytest.raises(GuideFileError, match="cannot be read"):
        read_untrusted(tmp_path / "nowhere.pkl")
    with pytest.raises(GuideFileError, match="is a folder"):
        read_untrusted(tmp_path)
    mocker.patch("psutil.virtual_memory").return_value.available = 1000
    with pytest.raises(GuideFileError, match="more memory"):
        read_untrusted(write(tmp_path / "f", torch.zeros(1000)))


LIMITED = """
import resource, sys, torch
from pathlib import Path
from ezhoi_diffusion.guide.formats import read_guide_file
from ezhoi_diffusion.guide.reading import GuideFileError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 10,) * 2)
try:
    read_guide_file(Path(sys.argv[1]))
except GuideFileError as error:
    sys.exit(0 if sys.argv[1] in str(error) and "allocate" not in str(error) and "Memory" not in str(error) else str(error)[:300])
sys.exit("it was read")
"""


def word(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def doubled(times: int) -> bytes:
    return b")" + b"2\x86" * times


NUMBERS = b"](" + b"K\x01" * 10_000 + b"e\x94"
BOMBS = {
    "keys of DICT": b"(" + doubled(40) + b"K\x01d.",
    "keys of a Counter": b"ccollections\nCounter\n(](" + doubled(40) + b"K\x01\x86etR.",
    "name of a dtype": b"cnumpy\ndtype\n" + doubled(40) + b"\x85R.",
    "image_id": b"}(" + word("embeddings") + pickle.dumps(np.ones((1, 2), np.float32), 2)[2:-1] + word("metadata") + b"](}" + word("image_id") + doubled(40) + b"seu.",
    "keys of one hash": b"}(" + b"".join(
        b"\x8a" + bytes([len(number)]) + number + b"N" for number in (pickle.encode_long(n * (2**61 - 1)) for n in range(1, 60_000))
    ) + b"u.",
    "one list many times": b"}(" + word("text_mean") + b"](" + NUMBERS + b"h\x00" * 60_000 + b"eu.",
    "large sizes": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(\x8b" + struct.pack("<i", 20_000) + b"\x01" * 20_000 + b"\x94"
    + b"h\x00" * 20_000 + b"t)tR.",
    "empty sets": b"(" + b"\x8f" * 3_000_000 + b"l.",
    "empty lists": b"(" + b"]" * 6_000_000 + b"l.",
    "marks": b"(" * 6_000_000 + b".",
    "memo": b"N" + b"\x94" * 4_000_000 + b".",
    **{
        f"copies by {name}": f"c{module}\n{name}\n".encode() + b"\x94](" + b"".join(item(n) for n in range(20_000)) + b"e\x94("
        + b"h\x00h\x01\x85R" * 5_000 + b"l."
        for module, name, item in (
            ("builtins", "set", lambda n: b"J" + struct.pack("<i", n)),
            ("torch", "Size", lambda n: b"J" + struct.pack("<i", n)),
            ("collections", "OrderedDict", lambda n: b"J" + struct.pack("<i", n) + b"N\x86"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_cannot_take_all_memory_or_time(tmp_path, name):
    (tmp_path / "f").write_bytes(b"\x80\x04" + BOMBS[name])
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "f")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def rewritten(path: Path, change) -> Path:
    """Write a torch file again with its members changed: name -> bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in change(members):
            archive.writestr(name, data)
    return path


def test_archives_with_two_programs_are_refused(tmp_path):
    path = write(tmp_path / "f", {"mean": torch.ones(4)}, "torch")
    for second in ("archive/data.pkl", "other/data.pkl"):
        with pytest.raises(GuideFileError, match=r"torch\.save did not write it"):
            read_untrusted(rewritten(path, lambda members, name=second: [(name, b"\x80\x02}."), *members.items()]))


def test_torchscript_archives_and_other_extra_members_are_not_run(tmp_path):
    """torch 2.5 runs TorchScript in `torch.load(weights_only=True)`; here nobody asks torch to read a file."""
    path = write(tmp_path / "f", {"mean": torch.ones(4)}, "torch")
    extra = [
        ("archive/constants.pkl", b"\x80\x02)."),
        ("archive/code/__torch__.py", b"x"),
        ("archive/DATA.PKL", b"\x80\x02}."),
    ]
    found = read_untrusted(rewritten(path, lambda members: [*extra, *members.items()]))
    assert torch.equal(found["mean"], torch.ones(4))


def test_no_torch_file_is_given_to_torch(tmp_path, mocker):
    load = mocker.patch("torch.load")
    for how in ("torch", "torch-old", "pickle4"):
        assert torch.equal(read_untrusted(write(tmp_path / "f", torch.arange(4), how)), torch.arange(4))
    load.assert_not_called()


def test_a_storage_with_two_sizes_is_refused(tmp_path):
    """Two tensors share a storage of 6 numbers; the file then claims 5 of them for the second."""
    base = torch.zeros(6)
    path = write(tmp_path / "f", {"a": base[:2], "b": base[2:4]}, "torch")

    def change(members):
        for name, data in members.items():
            at = data.rindex(b"K\x06") if name.endswith("data.pkl") else -1
            yield name, data[:at] + b"K\x05" + data[at + 2 :] if at >= 0 else data

    with pytest.raises(GuideFileError, match="two sizes"):
        read_untrusted(rewritten(path, change))


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Filled:
    """Pickled as an empty array that is filled later."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def view_of(storage, shape, stride):
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, shape, stride, False, OrderedDict())


@pytest.mark.parametrize("how", ["torch", "torch-old", "pickle2", "pickle4"])
def test_a_view_is_no_storage(tmp_path, how):
    """A view [2**28, 0] takes no memory, and as a storage it would seem to hold 2**28 numbers."""
    storage = torch.ones(1)._typed_storage()
    assert torch.equal(read_untrusted(write(tmp_path / "f", view_of(storage, (1,), (1,)), how)), torch.ones(1))
    parameter = Call(torch._utils._rebuild_parameter, torch.ones(1), False, OrderedDict())
    for view in (view_of(storage, (1 << 28, 0), (1, 1)), torch.ones(1), parameter, [1.0]):
        path = write(tmp_path / "f", {"embeddings": view_of(view, (1, 1), (0, 0))}, how)
        with pytest.raises(GuideFileError, match=r"f is damaged: (Tensor|list) in the place of a tensor's data"):
            read_untrusted(path)


def test_a_view_in_the_bytes_of_a_pickled_storage_is_no_storage(tmp_path):
    """A pickled tensor has its storage as an old torch file, which can hold a view instead."""
    inner = io.BytesIO()
    save_old(view_of(torch.ones(1)._typed_storage(), (1 << 28, 0), (1, 1)), inner)
    view = Call(torch.storage._load_from_bytes, inner.getvalue())
    for value in (view, view_of(view, (1, 1), (0, 0))):
        with pytest.raises(GuideFileError, match="Tensor in the place of a tensor's data"):
            read_untrusted(write(tmp_path / "f", {"embeddings": value}))


@pytest.mark.parametrize("how", ["torch", "torch-old", "pickle2", "pickle4"])
def test_a_number_in_the_place_of_bytes_is_refused(tmp_path, how):
    """From a tensor of one whole number n, bytes and bytearray make n zeros."""
    number, dtype = torch.tensor([1 << 20]), np.dtype("u1")
    scalar, frombuffer = np.uint8(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
    calls = [
        Call(bytes, number),
        Call(bytearray, number),
        Call(frombuffer, number, dtype, (1,), "C"),
        Call(scalar, dtype, number),
        Filled((1, (1,), dtype, False, number)),
    ]
    for call in calls:
        with pytest.raises(GuideFileError, match="f is damaged: Tensor in the place of bytes"):
            read_untrusted(write(tmp_path / "f", call, how))


def test_files_of_big_endian_machines_are_refused(tmp_path):
    path = write(tmp_path / "f", torch.ones(4), "torch")
    with pytest.raises(GuideFileError, match="big-endian"):
        read_untrusted(rewritten(path, lambda members: {**members, "archive/byteorder": b"big"}.items()))


def test_the_metadata_of_hico_det_fit_the_budget(tmp_path):
    """The metadata are largest, relative to the embeddings, where those are float16."""
    metadata = [
        {"image_id": f"HICO_train2015_{n // 20:08d}.jpg", "human_idx": 0, "object_idx": n % 9, "object_class": n % 80, "has_gt": True, "gt_verbs": [4, 5]}
        for n in range(20_000)
    ]  # fmt: skip
    big = {"embeddings": np.ones((20_000, 512), np.float16), "metadata": metadata, "config": {}}
    assert read_untrusted(write(tmp_path / "f", big))["metadata"] == metadata
