"""Remembered results of ops on fake tensors equal fresh ones, including views of the arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memstudy.profiler.results import Results, with_real_strides

ATEN = torch.ops.aten
CASES = {
    "product": (ATEN.mm.default, lambda x: (x, x.t())),
    "two results": (ATEN.native_dropout.default, lambda x: (x, 0.5, True)),
    "a list of views": (ATEN.split.Tensor, lambda x: (x, 2)),
    "a view": (ATEN.transpose.int, lambda x: (x, 0, 1)),
    "a view of a view": (ATEN.slice.Tensor, lambda x: (x[1:], 0, 1, 3)),
    "in place": (ATEN.add_.Tensor, lambda x: (x, x)),
    "a cast": (ATEN._to_copy.default, lambda x: (x,)),
    "a list given": (ATEN.cat.default, lambda x: ([x, x],)),
    "no result": (ATEN._foreach_add_.Scalar, lambda x: ([x, x], 1)),
}


def told(result, given):
    """Return a description of a result that can be compared: metadata, and storages shared with ``given``."""
    if isinstance(result, (list, tuple)):
        return [told(one, given) for one in result]
    if result is None:
        return None
    storage = result.untyped_storage()._cdata
    shared = [i for i, arg in enumerate(given) if torch.is_tensor(arg) and arg.untyped_storage()._cdata == storage]
    same = [result is arg for arg in given]
    return result.shape, result.stride(), result.dtype, result.storage_offset(), result.device, shared, same


@pytest.fixture
def fake():
    return FakeTensorMode()


def asked(results, fake, func, args, **kwargs):
    """Return the key of a call, whether its results were known, and its results."""
    key = results.key(func, args, kwargs)
    known, recalled = results.recall(key, args) if key else (False, None)
    if known:
        return key, True, recalled
    with fake:
        result = func(*args, **kwargs)
    if key:
        results.remember(key, func, args, kwargs, result)
    return key, False, result


@pytest.mark.parametrize("case", CASES)
def test_the_second_time_a_result_is_remembered_and_the_same(fake, case):
    func, make = CASES[case]
    results = Results(fake)
    with fake:
        first, second = make(torch.empty(6, 4)), make(torch.empty(6, 4))
    kwargs = {"dtype": torch.bfloat16} if case == "a cast" else {}
    _, known, expected = asked(results, fake, func, first, **kwargs)
    assert not known
    _, known, recalled = asked(results, fake, func, second, **kwargs)
    assert known or case == "no result"
    assert told(recalled, second) == told(expected, first)


def test_what_differs_in_any_way_is_asked_anew(fake):
    results = Results(fake)
    with fake:
        x = torch.empty(6, 4)
        others = torch.empty(6, 5), torch.empty(4, 6).t(), torch.empty(6, 4, dtype=torch.float64), torch.empty(7, 4)[1:]
    keys = {results.key(ATEN.add.Scalar, (tensor, 1), {}) for tensor in (x, *others)}
    keys |= {results.key(ATEN.add.Scalar, (x, number), {}) for number in (1.0, True, 2)}
    assert len(keys) == 8


@pytest.mark.parametrize(
    ("func", "args"),
    [(ATEN.nonzero.default, ()), (ATEN.resize_.default, ([2],)), (ATEN.t_.default, ())],
    ids=["depends on data", "other storage", "changes its view"],
)
def test_what_does_not_follow_from_the_arguments_is_never_remembered(func, args):
    fake = FakeTensorMode(shape_env=None, allow_non_fake_inputs=True)
    results = Results(fake)
    with fake:
        x = torch.empty(6, 4)
    key = results.key(func, (x, *args), {})
    results.remember(key, func, (x, *args), {}, x)
    assert results.recall(key, (x, *args)) == (False, None)


def test_a_real_tensor_has_no_key(fake):
    assert Results(fake).key(ATEN.add.Scalar, (torch.empty(2), 1), {}) is None


@pytest.mark.parametrize(
    ("shape", "strides", "viewed"),
    [
        ((2, 1, 4, 32), (128, 32, 32, 1), (2, 1, 128)),
        ((2, 1), (1, 5), (1, 2, 1)),
        ((2, 1, 8), (8, 3, 1), (2, 1, 8)),
        ((), (), (1, 1)),
    ],
)
def test_a_fake_view_gets_the_strides_of_a_real_one(fake, shape, strides, viewed):
    real = torch.empty_strided(shape, strides).view(viewed)
    with fake:
        given = torch.empty_strided(shape, strides)
        result = with_real_strides(ATEN.view.default, (given, viewed), given.view(viewed))
    assert result.stride() == real.stride()
    assert result.shape == real.shape
    assert result.untyped_storage()._cdata == given.untyped_storage()._cdata
