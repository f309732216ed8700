"""What goes into a capture comes out the same: values, bits, identity, layout."""

from __future__ import annotations

import dataclasses
import enum
import math
import pathlib
import struct
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanguard.capture.decode import TreeDecoder
from nanguard.capture.encode import TreeEncoder
from nanguard.capture.unstored import Unstored
from nanguard.errors import CaptureError

Point = namedtuple("Point", ["x", "y"])


class Colour(enum.Enum):
    RED = 1
    BLUE = "blue"


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclasses.dataclass
class Sample:
    image: Any
    label: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Slotted:
    __slots__ = ("value",)
    value: Any


class Encoding(UserDict):
    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self._encodings = [object()]
        self.n_sequences = 2


class Output(OrderedDict):
    def __init__(self) -> None:
        raise AssertionError("a reader must not call this")


class Cleaner(UserDict):
    def __del__(self) -> None:
        pass


def round_trip(value: Any, **options: Any) -> Any:
    encoder = TreeEncoder()
    node = encoder.encode(value, "batch")
    return TreeDecoder(pathlib.Path("file"), encoder.tensors, **options).decode(node, "batch")


def missing(value: Any) -> list[tuple[str, str]]:
    encoder = TreeEncoder()
    encoder.encode(value, "batch")
    return [(entry["path"], entry["reason"]) for entry in encoder.missing]


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def same(one: Any, other: Any) -> bool:
    """Equality that knows NaN, types and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        facts = ("shape", "dtype", "requires_grad")
        return (
            all(getattr(one, f) == getattr(other, f) for f in facts)
            and one.stride() == other.stride()
            and bits(one) == bits(other)
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        keys = zip(one, other, strict=True) if len(one) == len(other) else [(0, 1)]
        return all(same(a, b) for a, b in keys) and all(same(one[a], other[b]) for a, b in zip(one, other, strict=True))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return bool(one == other)


dtypes = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


tensors = st.builds(
    random_bits, st.lists(st.integers(0, 4), max_size=4).map(tuple), st.sampled_from(dtypes), st.integers(0, 2**32)
)
views = st.sampled_from(
    [
        lambda t: t,
        lambda t: t.T if t.dim() == 2 else t,
        lambda t: t.expand(3, *t.shape),
        lambda t: t[..., ::2] if t.dim() else t,
        lambda t: t.unsqueeze(0).transpose(0, -1),
        lambda t: t[1:] if t.dim() else t,
    ]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=[])),
    st.binary(max_size=40),
    st.complex_numbers(),
    st.sampled_from([Colour.RED, Colour.BLUE, Access.READ | Access.WRITE, Access(0)]),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2, 3]), torch.Size([]), pathlib.Path("a/b"), ...]),
    st.sampled_from([slice(1, None, 2), range(3), torch.channels_last, torch.sparse_coo]),
    st.sampled_from(
        [np.float32(1.5), np.datetime64("2020-01-01"), np.int8(-3), np.str_("x"), np.arange(6).reshape(2, 3).T]
    ),
)
keys = st.one_of(
    st.text(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.tuples(st.integers()),
    st.sampled_from([np.int64(3), Colour.RED, pathlib.Path("a"), 1j]),
)
leaves = st.one_of(scalars, st.builds(lambda t, view: view(t), tensors, views))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.builds(Point, inner, inner),
        st.builds(Sample, inner, inner),
        st.builds(Frozen, inner),
        st.builds(Slotted, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back(value: Any) -> None:
    assert missing(value) == []
    assert same(round_trip(value), value)


@pytest.mark.parametrize("dtype", dtypes, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4, 5)], ids=str)
def test_every_dtype_keeps_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = random_bits(shape, dtype, 7)
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(4, 6).T,
        lambda: torch.randn(4, 1).expand(4, 7),
        lambda: torch.randn(3, 4, 6)[:, ::2, 1:4],
        lambda: torch.randn(2, 3, dtype=torch.complex64).T.conj(),
        lambda: torch.randn(2, 3, dtype=torch.complex64).conj().imag,
    ],
)
def test_strides_come_back(make: Any) -> None:
    value = make()
    back = round_trip(value)
    assert back.stride() == value.stride()
    assert torch.equal(back, value)


def test_overlapping_windows_keep_their_values() -> None:
    value = torch.arange(8.0).unfold(0, 4, 1)
    assert torch.equal(round_trip(value), value)


def test_an_expanded_tensor_is_stored_once() -> None:
    encoder = TreeEncoder()
    encoder.encode(torch.randn(1, 4).expand(1000, 4), "batch")
    assert [stored.numel() for stored in encoder.tensors.values()] == [4]


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_sparse_tensors(layout: torch.layout, dtype: torch.dtype) -> None:
    dense = torch.zeros(4, 6, dtype=dtype)
    dense[1, 2], dense[3, 5] = 1.5, -2
    value = dense.to_sparse(layout=layout, blocksize=(2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None)
    back = round_trip(value)
    assert back.layout is layout
    assert torch.equal(back.to_dense(), dense)


def test_uncoalesced_sparse_keeps_its_entries() -> None:
    value = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,))
    back = round_trip(value)
    assert not back.is_coalesced()
    assert torch.equal(back._values(), value._values())


def test_identity_and_sharing() -> None:
    t = torch.randn(3, requires_grad=True)
    shared = [t]
    base = torch.randn(4)
    back = round_trip({"a": t, "b": (t, shared), "c": shared, "v": base[:2], "w": base[2:]})
    assert back["a"] is back["b"][0]
    assert back["b"][1] is back["c"]
    assert back["a"].requires_grad
    assert torch.equal(torch.cat([back["v"], back["w"]]), base)


def test_what_is_read_is_the_readers_own() -> None:
    encoder = TreeEncoder()
    value = torch.ones(3)
    node = encoder.encode(value, "batch")
    decoder = TreeDecoder(pathlib.Path("file"), encoder.tensors)
    decoder.decode(node, "batch").add_(1)
    assert torch.equal(decoder.decode(node, "batch"), torch.ones(3))
    assert torch.equal(value, torch.ones(3))


def test_parameters_stay_parameters() -> None:
    back = round_trip(torch.nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(back) is torch.nn.Parameter
    assert not back.requires_grad


def test_library_dictionaries() -> None:
    value = Encoding({"input_ids": torch.arange(3)})
    encoder = TreeEncoder()
    node = encoder.encode(value, "batch")
    assert [(e["path"], e["optional"]) for e in encoder.missing] == [("batch._encodings[0]", True)]
    back = TreeDecoder(pathlib.Path("file"), encoder.tensors).decode(node, "batch")
    assert type(back) is Encoding
    assert torch.equal(back["input_ids"], torch.arange(3))
    assert back.n_sequences == 2
    assert list(encoder.tensors) == ['batch["input_ids"]']
    with pytest.raises(CaptureError, match=r"batch\._encodings\[0\].*was not stored"):
        back._encodings[0].ids


def test_dictionaries_of_other_classes() -> None:
    output = OrderedDict.__new__(Output)
    output["logits"] = torch.ones(2)
    back = round_trip(output)
    assert type(back) is Output
    assert list(back) == ["logits"]
    counted = round_trip(Counter("hello"))
    assert type(counted) is Counter
    assert counted == Counter("hello")
    grouped = round_trip(defaultdict(list, {"a": [1]}))
    assert grouped["new"] == []


def test_a_factory_that_is_no_builtin_is_missing_until_it_is_needed() -> None:
    value = defaultdict(lambda: 3, a=1)
    back = round_trip(value)
    assert back["a"] == 1
    with pytest.raises(CaptureError, match="default_factory"):
        back["b"]


def test_packed_sequences() -> None:
    value = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    back = round_trip(value)
    assert type(back) is type(value)
    assert torch.equal(back.batch_sizes, value.batch_sizes)


def test_sets_and_object_arrays() -> None:
    assert round_trip({1, "a", (2, 3.0)}) == {1, "a", (2, 3.0)}
    assert round_trip(frozenset([None])) == frozenset([None])
    array = np.array([[torch.ones(1), "x"], [None, 2]], dtype=object)
    back = round_trip(array)
    assert back.shape == (2, 2)
    assert torch.equal(back[0, 0], torch.ones(1))
    fortran = round_trip(np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    assert fortran.flags.f_contiguous
    assert fortran.flags.writeable


class Parser:
    pass


class Doubled(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ({"meta": {"parser": Parser()}}, 'batch["meta"]["parser"]', "do not know this type"),
        ([1, lambda: 2], "batch[1]", "do not know this type"),
        (Sample(open), "batch.image", "do not know this type"),
        ({"x": torch.ones(2).as_subclass(Doubled)}, 'batch["x"]', "tensor subclass"),
        ([torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)], "batch[0]", "quantized"),
        ([torch.empty(2, device="meta")], "batch[0]", "meta device"),
        ([torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])], "batch[0]", "nested"),
        ({Parser: 1}, "batch[type key]", "key cannot be stored"),
        ([{Parser()}], "batch[0]", "needs a plain value"),
        ([Cleaner()], "batch[0]", "do not know this type"),
        ([np.zeros(1, dtype=[("a", "i4")])], "batch[0]", "dtype"),
    ],
)
def test_what_cannot_be_stored_is_named(value: Any, path: str, reason: str) -> None:
    found = missing(value)
    assert [entry[0] for entry in found] == [path]
    assert reason in found[0][1]
    round_trip(value)  # the rest comes back


def test_classes_inside_functions_are_named() -> None:
    @dataclasses.dataclass
    class Local:
        x: int

    [(path, reason)] = missing([Local(1)])
    assert path == "batch[0]"
    assert "top of a module" in reason


def test_a_value_that_raises_costs_only_itself() -> None:
    value = {"good": torch.ones(1), "bad": Angry(1)}
    back = round_trip(value)
    assert torch.equal(back["good"], torch.ones(1))
    assert isinstance(back["bad"], Unstored)
    assert "gone" in back["bad"].reason


@dataclasses.dataclass
class Angry:
    image: Any
    label: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name == "image":
            raise OSError("gone")
        return object.__getattribute__(self, name)


def test_cycles_and_depth_end() -> None:
    cyclic: dict[str, Any] = {"x": torch.ones(1)}
    cyclic["self"] = cyclic
    assert missing(cyclic) == [('batch["self"]', "it contains itself")]
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    [(_, reason)] = missing(deep)
    assert "levels deep" in reason


def test_shared_structure_does_not_explode() -> None:
    value: list[Any] = [torch.ones(1)]
    for _ in range(60):
        value = [value, value]
    back = round_trip(value)
    assert back[0] is back[1]


def test_unstored_values_refuse_every_use() -> None:
    back = round_trip([Parser()])[0]
    assert "not stored: batch[0]" in repr(back)
    for use in (
        lambda: back.x,
        lambda: back(),
        lambda: back[0],
        lambda: list(back),
        lambda: len(back),
        lambda: bool(back),
    ):
        with pytest.raises(CaptureError, match=r"batch\[0\] .*fill=\{'batch\[0\]': value\}"):
            use()


def test_fill_takes_the_place_of_a_part() -> None:
    value = {"meta": {"parser": Parser(), "n": 1}}
    assert round_trip(value, fill={'batch["meta"]["parser"]': 5}) == {"meta": {"parser": 5, "n": 1}}
    assert round_trip(value, fill={'batch["meta"]': None}) == {"meta": None}
