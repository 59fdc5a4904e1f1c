"""Checkpoints that people bring: whatever was saved beside the weights, they load, and nothing in them runs."""

import argparse
import collections
import copyreg
import datetime
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import published_dat
import pytest
import torch
from torch import Tensor, nn

import dynattn
from dynattn import checkpoint_files, official

FORMATS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "old": {"_use_new_zipfile_serialization": False},
    "old, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}
# A module that nobody has: it is there while a file is written, and any import of it afterwards fails the test.
GONE = "nobody_has_this"


def weights(old: bool = False) -> dict[str, Tensor]:
    """A state dict with all kinds of tensors that checkpoints have: dtypes, views, layouts, attributes."""
    base = torch.arange(24.0).view(4, 6)
    marked = nn.Parameter(torch.randn(3))
    marked.no_weight_decay = True
    tagged = torch.randn(2)
    tagged.story = "an attribute"
    return collections.OrderedDict(
        whole=base,
        row=base[2],
        turned=base.mT,
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(3.5),
        parameter=nn.Parameter(torch.randn(2, 2)),
        marked=marked,
        tagged=tagged,
        **{
            name: torch.tensor([0, 1, 1], dtype=getattr(torch, name))
            for name in ("float16", "bfloat16", "float64", "int64", "uint8", "bool") + ("uint16",) * (not old)
        },
    )


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    alike = lambda a, b: a.dtype == b.dtype and torch.equal(a, b.detach())  # noqa: E731
    return found.keys() == wanted.keys() and all(alike(found[key], wanted[key]) for key in wanted)


class Refuse:
    """An importer that says who tried to import what nobody has."""

    def find_spec(self, name, *_):
        assert not name.startswith(GONE), f"{name} was imported"


@pytest.fixture
def foreign(monkeypatch):
    """Make classes of a module that exists only until `foreign.forget` is called."""
    module = types.ModuleType(GONE)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, GONE, module)

        def make(name: str, base: type = object, **members) -> type:
            kind = type(name, (base,), {"__module__": GONE, **members})
            setattr(module, name, kind)
            return kind

        make.forget = lambda: (patch.undo(), monkeypatch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path]))
        yield make


def beside_the_weights(foreign) -> dict[str, object]:
    """What training runs save: configurations, arguments, histories, numbers of numpy."""
    node = foreign("CfgNode", dict)  # yacs
    config = node(LR=1e-3, MODEL=node(DIMS=[96, 192], NAME="dat"))
    config.__dict__["__immutable__"] = True
    omega = foreign("DictConfig")  # omegaconf: a graph of objects that point to their parents
    parent, child = omega(), omega()
    parent.__dict__.update(_content={"child": child}, _parent=None)
    child.__dict__.update(_content={"x": 1}, _parent=parent, flags={"readonly": True})
    history = foreign("HistoryBuffer", __setstate__=lambda self, state: self.__dict__.update(state))  # mmengine
    buffer = history()
    buffer.__dict__.update(_log_history=np.arange(3.0), _max_length=10)
    slotted = foreign("Slotted", __slots__=("a",))()
    slotted.a = [1]
    cycle = foreign("Trainer")()
    cycle.me, cycle.all = cycle, [cycle]
    return {
        "config": config,
        "omega": parent,
        "args": argparse.Namespace(lr=1e-3, output=Path("runs"), started=datetime.datetime(2022, 1, 1)),
        "max_accuracy": np.float64(81.7),
        "epoch": np.int64(299),
        "curve": np.linspace(0, 1, 5, dtype=np.float32),
        "objects": np.array([config, None], dtype=object),
        "meta": {"hook_msgs": collections.defaultdict(list, a=[buffer]), "last": collections.deque([buffer], 3)},
        "message_hub": {"scalars": foreign("List", list)([1, 2]), "names": foreign("Set", set)({1, 2})},
        "counts": collections.Counter("abc"),
        "classes": {"ring", "star"},
        "kind": foreign("Kind"),
        "function": os.path.join,
        "slotted": slotted,
        "cycle": cycle,
        foreign("Key")(): {(foreign("Inside")(), 1): None},
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "scaler": {"scale": 65536.0, "device": torch.device("cpu"), "size": torch.Size([2]), "dtype": torch.float16},
    }


@pytest.mark.parametrize("how", FORMATS)
def test_whatever_lies_beside_the_weights_they_load(how, tmp_path, foreign):
    state = weights("old" in how)  # torch cannot read uint16 from files of the old format
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}}, "param_groups": [{"lr": 1e-3}]}
    content = {**beside_the_weights(foreign), "optimizer": optimizer, "model": state}
    torch.save(content, tmp_path / "run.pth", **FORMATS[how])
    foreign.forget()
    assert same(official.read_state_dict(tmp_path / "run.pth"), state)
    assert GONE not in sys.modules


@pytest.mark.parametrize("how", FORMATS)
def test_objects_become_placeholders(how, tmp_path, foreign):
    config = foreign("CfgNode", dict)(LR=1e-3)
    config.name = "mine"
    torch.save({"config": config, "best": np.float32(0.5), "state_dict": {}}, tmp_path / "run.pth", **FORMATS[how])
    foreign.forget()
    content = checkpoint_files.read(tmp_path / "run.pth")
    assert [type(content[key]) for key in ("config", "best")] == [checkpoint_files.Placeholder] * 2
    assert content["config"].name == f"{GONE}.CfgNode" and content["config"].state == {"name": "mine"}
    assert content["best"].name.endswith("multiarray.scalar")


def test_a_published_training_run_loads_into_its_model(tmp_path, foreign):
    """As DAT's authors save it: a yacs configuration beside weights, optimiser and scaler."""
    shapes = published_dat.shapes("dat_tiny")
    state = {key: torch.full((), 0.5).expand(shape) for key, shape in shapes.items()}
    torch.save({"model": state, "config": foreign("CfgNode", dict)(LR=1e-3)}, tmp_path / "run.pth")
    foreign.forget()
    model = dynattn.load_official(dynattn.create_model("dat_tiny"), tmp_path / "run.pth")
    assert all(bool((value == 0.5).all()) for value in model.state_dict().values())
    assert official.model_from(tmp_path / "run.pth")[0] == "dat_tiny"


# ---------------------------------------------------------------- the weights are those of the file


def test_what_is_read_does_not_change_with_the_file(tmp_path, foreign):
    """Files are mapped into memory while they are read, and not longer."""
    state = {"a": torch.randn(1000), "b": torch.randn(10)}
    torch.save({"model": state, "config": foreign("CfgNode", dict)()}, tmp_path / "run.pth")
    foreign.forget()
    found = official.read_state_dict(tmp_path / "run.pth")
    with open(tmp_path / "run.pth", "r+b") as stream:
        stream.write(bytes((tmp_path / "run.pth").stat().st_size))
    assert same(found, state)


def test_a_file_that_was_zipped_again_with_compression(tmp_path, foreign):
    """Its tensors do not lie in it as they are, so it is not mapped."""
    state = {"a": torch.zeros(5000), "b": torch.arange(5000.0)}
    torch.save({"model": state, "config": foreign("CfgNode", dict)()}, tmp_path / "run.pth")
    foreign.forget()
    with zipfile.ZipFile(tmp_path / "run.pth") as old, zipfile.ZipFile(tmp_path / "packed.pth", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "packed.pth").stat().st_size < 30_000
    assert same(official.read_state_dict(tmp_path / "packed.pth"), state)


class Buffered(nn.Module):
    """A module with buffers of both kinds, a parameter that is None, and one inside another."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.register_buffer("kept", torch.randn(2))
        self.register_buffer("passing", torch.randn(2), persistent=False)
        self.register_parameter("none", None)
        self.act = torch.nn.functional.gelu


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("wrapped", [lambda m: m, lambda m: {"model": m, "epoch": 3}, nn.DataParallel])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_a_model_that_was_saved_whole(how, wrapped, tmp_path, monkeypatch):
    model = Buffered()
    torch.save(wrapped(model), tmp_path / "model.pth", **FORMATS[how])
    monkeypatch.delattr(sys.modules[__name__], "Buffered")
    assert same(official.read_state_dict(tmp_path / "model.pth"), model.state_dict())


# ---------------------------------------------------------------- nothing runs


class Reduced:
    """Unpickling it makes a folder, by a call of a function."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


class Stateful:
    """Unpickling it makes a folder, by its own `__setstate__`."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __setstate__(self, state):
        os.mkdir(state["mark"])


class Setter(Reduced):
    """Unpickling it makes a folder, by a function that sets its state."""

    def __reduce__(self):
        return object.__new__, (Reduced,), self.mark, None, None, set_by_making


def set_by_making(thing, state):
    os.mkdir(state)


class Mapping(dict):
    """A dict whose `__setitem__` makes a folder."""

    def __setitem__(self, key, value):
        os.mkdir(value)


class Listing(list):
    """A list whose `append` and `extend` make a folder."""

    def append(self, value):
        os.mkdir(value)

    def extend(self, values):
        os.mkdir(values[0])


BOMBS = {
    "reduce": Reduced,
    "setstate": Stateful,
    "state setter": Setter,
    "mapping": lambda mark: Mapping(a=str(mark)),
    "listing": lambda mark: Listing([str(mark)]),
    "partial": lambda mark: Partial(mark),
}
PLACES = {
    "beside": lambda bomb: {"b": bomb, "model": {"a": torch.ones(2)}},
    "in a list": lambda bomb: {"b": [(bomb, [bomb])], "model": {"a": torch.ones(2)}},
    "as a key": lambda bomb: {(1, Held(bomb)): 1, "model": {"a": torch.ones(2)}},
    "in a state": lambda bomb: {"b": argparse.Namespace(x=bomb), "model": {"a": torch.ones(2)}},
    "in a configuration": lambda bomb: {"b": Plain(x=argparse.Namespace(y=bomb)), "model": {"a": torch.ones(2)}},
}


class Held:
    """Something to be held by a key; its hash is its identity."""

    def __init__(self, bomb):
        self.bomb = bomb


class Plain(dict):
    """A harmless dict of a class of its own."""


class Partial(Reduced):
    """Two calls: a function is fetched by `getattr`, and called."""

    def __reduce__(self):
        return Late(), (self.mark,)


class Late:
    """Becomes `os.mkdir` when it is unpickled."""

    def __call__(self, *_):
        raise AssertionError

    def __reduce__(self):
        return getattr, (os, "mkdir")


copyreg.pickle(type(os), lambda module: (__import__, (module.__name__,)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bomb", BOMBS)
def test_nothing_runs(bomb, place, tmp_path):
    mark = tmp_path / "exploded"
    content = PLACES[place](BOMBS[bomb](mark))
    for how, options in FORMATS.items():
        torch.save(content, tmp_path / "evil.pth", **options)
        assert same(official.read_state_dict(tmp_path / "evil.pth"), {"a": torch.ones(2)}), how
        assert not mark.exists(), how
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert mark.exists()  # the bomb is a real one


def archive(path: Path, program: bytes, **others: bytes) -> Path:
    """A zip file as `torch.save` writes it, around a pickle that was written by hand."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **others}.items():
            file.writestr(f"archive/{name}", content)
    return path


def test_known_functions_cannot_be_changed(tmp_path):
    """A pickle may set attributes of what it names; not of the functions that make tensors, and not of placeholders."""
    before = dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor_v2.__defaults__
    names = [b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n", b"nobody\nknows\n"]
    for name in names:
        program = b"\x80\x02c" + name + b"N}X\x0c\x00\x00\x00__defaults__K\x01s\x86b0}."
        assert checkpoint_files.read(archive(tmp_path / "evil.pth", program)) == {}
    after = dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor_v2.__defaults__
    assert before == after and not hasattr(checkpoint_files.Placeholder, "__defaults__")


def test_what_opcodes_call(tmp_path):
    """INST and OBJ, of old protocols, call as well; what is no function cannot be called."""
    mark = tmp_path / "exploded"
    word = repr(str(mark)).encode()
    inst, obj = b"}(S" + word + b"\nios\nmkdir\n0.", b"}(cos\nmkdir\nS" + word + b"\no0."
    for program in (inst, obj):
        assert checkpoint_files.read(archive(tmp_path / "evil.pth", program)) == {}
        pickle.loads(program)
        mark.rmdir()
    program = b"\x80\x02}X\x01\x00\x00\x00a)R."
    with pytest.raises(pickle.UnpicklingError, match="calls a str, which is no function"):
        checkpoint_files.read(archive(tmp_path / "evil.pth", program))


def test_the_registry_of_extensions_is_neither_used_nor_filled(tmp_path):
    """`copyreg` numbers names, and keeps what they led to for every later pickle of the process."""
    copyreg.add_extension("os", "mkdir", 77)
    try:
        program = b"\x80\x02}\x82\x4d" + b"X" + len(str(tmp_path / "m")).to_bytes(4, "little")
        program += str(tmp_path / "m").encode() + b"\x85R0."
        assert checkpoint_files.read(archive(tmp_path / "evil.pth", program)) == {}
        assert not (tmp_path / "m").exists()
        assert pickle.loads(b"\x80\x02\x82\x4d.") is os.mkdir  # as the registry says, no placeholder
        assert checkpoint_files.read(archive(tmp_path / "evil.pth", program)) == {}  # from the cache
        assert not (tmp_path / "m").exists()
    finally:
        copyreg.remove_extension("os", "mkdir", 77)


def test_the_old_format_writes_no_patch(tmp_path, monkeypatch):
    """torch compares the source of classes that the file names, and may write what differs into a file."""
    monkeypatch.chdir(tmp_path)
    model = Buffered()
    stream = io.BytesIO()
    torch.save(model, stream, _use_new_zipfile_serialization=False)
    (tmp_path / "model.pth").write_bytes(
        stream.getvalue().replace(b"both kinds, a parameter", b"both types, a parameter")
    )
    monkeypatch.setattr(Buffered, "dump_patches", True)
    assert same(official.read_state_dict("model.pth"), model.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


def test_torchscript_is_refused(tmp_path):
    """It is a program; torch would run it in an interpreter of its own."""
    empty = pickle.dumps({}, protocol=2)
    evil = pickle.dumps({"a": Reduced(tmp_path / "exploded")}, protocol=2)
    archive(tmp_path / "script.pth", evil, **{"constants.pkl": empty})
    with pytest.raises(ValueError, match=r"script.pth is not a checkpoint, or is damaged \(.*TorchScript"):
        official.read_state_dict(tmp_path / "script.pth")
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- what cannot be read is told


class Forged:
    """Pickles as a call of one of torch's functions on something that is no storage."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        (
            Forged(torch._utils._rebuild_tensor_v2, Held(1), 0, (2,), (1,), False, None),
            "a tensor is made from .*Held, not from numbers",
        ),
        (Forged(torch._utils._rebuild_tensor_v2, [1.0], 0, (2,), (1,), False, None), "a tensor is made from a list"),
        (Forged(torch._utils._rebuild_parameter, Held(1), False, None), "a parameter is made from .*Held"),
        (Forged(torch._utils._rebuild_parameter, 3, False, None), "a parameter is made from a int"),
    ],
)
def test_a_tensor_that_is_made_from_something_else(forged, message, tmp_path):
    torch.save({"x": Held(1), "model": {"a": forged}}, tmp_path / "forged.pth")
    with pytest.raises(ValueError, match=f"forged.pth is not a checkpoint, or is damaged .*{message}"):
        official.read_state_dict(tmp_path / "forged.pth")


def test_an_entry_that_is_no_tensor_is_named(tmp_path, foreign):
    torch.save({"model": {"a": foreign("Odd")(), "b": torch.ones(1)}}, tmp_path / "odd.pth")
    torch.save(foreign("Other")(), tmp_path / "other.pth")
    foreign.forget()
    with pytest.raises(ValueError, match=f"expected tensors by name.*got {{a: {GONE}.Odd, b: Tensor}}"):
        official.read_state_dict(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"holds a {GONE}.Other, not a state dict"):
        official.read_state_dict(tmp_path / "other.pth")


@pytest.mark.parametrize("how", ["zip", "old"])
def test_a_training_run_that_was_cut_off(how, tmp_path, foreign):
    content = {"model": {"a": torch.zeros(5000)}, "config": foreign("CfgNode", dict)(LR=1e-3)}
    torch.save(content, tmp_path / "run.pth", **FORMATS[how])
    foreign.forget()
    whole = (tmp_path / "run.pth").read_bytes()
    for size in (0, 50, len(whole) // 2, len(whole) - 100):
        (tmp_path / "run.pth").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="run.pth is not a checkpoint, or is damaged") as caught:
            official.read_state_dict(tmp_path / "run.pth")
        assert "\n" not in str(caught.value)
