"""Reading untrusted checkpoint files: tensors and plain values, or an error."""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same

from chargpt.checkpoints import (
    check_optimizer_state,
    check_weights,
    read_tensors_and_plain_values,
)
from chargpt.model import UserError

SOME = {
    "weights": torch.nn.Linear(3, 2).state_dict(),
    "step": torch.tensor(7.0),
    "none": torch.zeros(0, 4),
    "rng": torch.get_rng_state(),
    "numbers": [1, 2.5, True, None, 10**30, -1, (3, 4), {"a": {}}],
    "text": "ä\n€😀",
}


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def with_records(path: Path, **records: bytes) -> Path:
    """A valid checkpoint file with records replaced or added."""
    save(path, SOME)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
        folder = archive.namelist()[0].partition("/")[0]
    contents |= {f"{folder}/{name.replace('__', '/')}": data for name, data in records.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    return with_records(path, **{"data.pkl": data})


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


# ---- accepted files ----


def test_tensors_and_plain_values_are_read_as_torch_reads_them(tmp_path):
    path = save(tmp_path / "a.ckpt", SOME)
    read, expected = read_tensors_and_plain_values(path), torch.load(path, weights_only=True)
    read["weights"], expected["weights"] = dict(read["weights"]), dict(expected["weights"])
    assert_same(read, expected)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
)
def test_every_type_of_number_is_read(tmp_path, dtype):
    values = torch.tensor([[0, 1], [2, 3]]).to(getattr(torch, dtype))
    assert_same(read_tensors_and_plain_values(save(tmp_path / "a.ckpt", values)), values)


def test_tensors_that_share_their_data_still_do(tmp_path):
    weight = torch.randn(4, 4)
    read = read_tensors_and_plain_values(save(tmp_path / "a.ckpt", [weight, weight, weight[1:3]]))
    assert read[0].data_ptr() == read[1].data_ptr()
    assert torch.equal(read[2], weight[1:3])


def test_a_state_dict_can_be_loaded_into_a_module(tmp_path):
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    state = read_tensors_and_plain_values(save(tmp_path / "a.ckpt", module.state_dict()))
    other.load_state_dict(state, assign=True)
    other(torch.ones(3)).sum().backward()  # weights that can be trained
    assert torch.equal(other.weight, module.weight)


# ---- refused files ----


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tensors_and_plain_values(path)
    message = str(error.value)
    assert str(path) in message and len(message.splitlines()) <= 2
    return message


@pytest.mark.parametrize(
    "function", [os.mkdir, bytearray, set, torch.load], ids=lambda function: function.__name__
)
def test_functions_are_not_called(tmp_path, function):
    path = save(tmp_path / "a.ckpt", [Call(function, str(tmp_path / "new"))])
    assert f" {function.__name__};" in refusal(path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1000, 1000),
        torch.zeros(3, 4).t(),
        torch.zeros(4)[::2],
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_tensors_that_are_not_contiguous_are_refused(tmp_path, tensor):
    assert "not plain and contiguous" in refusal(save(tmp_path / "a.ckpt", [tensor]))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.float32,
        torch.nn.Linear(1, 1),
    ],
    ids=["sparse", "meta", "dtype", "module"],
)
def test_other_objects_are_refused(tmp_path, value):
    refusal(save(tmp_path / "a.ckpt", {"value": value}))


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    assert "damaged" in refusal(with_records(tmp_path / "a.ckpt", data__0=b"1234"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04](" + b"\x8f" * 1000 + b"e.",
        b"\x80\x02}" + b"\x8b" + struct.pack("<i", -1) + b".",
        b"\x80\x02\x82\x01.",
        b"\x80\x02Q.",
        b"\x80\x02}",
        b"",
    ],
    ids=["sets", "long", "extension", "no storage", "no end", "empty"],
)
def test_pickles_that_torch_did_not_write_are_refused(tmp_path, data):
    refusal(with_pickle(tmp_path / "a.ckpt", data))


def test_values_cannot_multiply(tmp_path):
    values: list = [0] * 10
    for _ in range(15):
        values = [values] * 10
    assert "too often" in refusal(save(tmp_path / "a.ckpt", values))
    loop: list = []
    loop.append(loop)
    assert "too often" in refusal(save(tmp_path / "a.ckpt", loop))
    assert "too often" in refusal(save(tmp_path / "a.ckpt", [torch.zeros(1000)] * 100))
    nested = b"]" * 100_000 + b"a" * 99_999  # others would copy or compare it by recursion
    assert "too often" in refusal(with_pickle(tmp_path / "a.ckpt", b"\x80\x02" + nested + b"."))


def test_an_archive_that_is_longer_than_its_file_is_refused(tmp_path):
    path = with_records(tmp_path / "a.ckpt")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/99", bytes(1 << 20))
    assert "compressed or oversized records" in refusal(path)


def test_other_files_are_refused_by_what_is_wrong(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.ckpt")
    assert "Is a directory" in refusal(tmp_path)
    (path := tmp_path / "a.ckpt").write_text("Tiny Shakespeare")
    assert "damaged" in refusal(path)
    torch.save(SOME, path, _use_new_zipfile_serialization=False)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, share):
    data = save(tmp_path / "a.ckpt", SOME).read_bytes()
    (tmp_path / "a.ckpt").write_bytes(data[: int(share * len(data))])
    assert "truncated" in refusal(tmp_path / "a.ckpt")


# ---- weights and optimizer state ----


@pytest.mark.parametrize(
    "weight, reason",
    [
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([float("-inf")]), "not finite"),
        (torch.tensor([1]), "floating-point"),
        (torch.tensor([True]), "floating-point"),
        ([1.0], "floating-point"),
        (torch.tensor([1.0], dtype=torch.float64), "different dtypes"),
    ],
    ids=str,
)
def test_weights_are_finite_numbers_of_one_type(weight, reason):
    check_weights({"a": torch.ones(2, dtype=torch.bfloat16)}, "a.ckpt")
    with pytest.raises(UserError, match=f"a.ckpt: .*{reason}"):
        check_weights({"a": torch.ones(2), "b": weight}, "a.ckpt")


def trained_optimizer(kind: type = torch.optim.AdamW) -> torch.optim.Optimizer:
    """Two parameter groups; one parameter has had no gradient."""
    a, b, c = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 3), (4,), (3,)))
    optimizer = kind([dict(params=[a, b]), dict(params=[c], weight_decay=0.0)], lr=0.1)
    (a.sum() + c.sum()).backward()
    optimizer.step()
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


def test_the_state_of_an_optimizer_fits_it():
    optimizer = trained_optimizer()
    check_optimizer_state(optimizer.state_dict(), parameters_of(optimizer))


def spoil(state: dict, name: str, value: Any) -> None:
    state["state"][2][name] = value


SPOILED = {
    "another shape": (
        lambda s: spoil(s, "exp_avg", torch.zeros(2)),
        r"exp_avg has shape \[2\], not \[3\]",
    ),
    "one number": (lambda s: spoil(s, "exp_avg_sq", torch.zeros(())), r"has shape \[\], not \[3\]"),
    "several steps": (
        lambda s: spoil(s, "step", torch.zeros(3)),
        r"step has shape \[3\], not \[\]",
    ),
    "not finite": (lambda s: spoil(s, "exp_avg", torch.full((3,), float("inf"))), "not finite"),
    "integers": (lambda s: spoil(s, "exp_avg", torch.zeros(3).long()), "floating-point"),
    "text": (lambda s: spoil(s, "step", "7"), "floating-point"),
    "unknown parameter": (lambda s: s["state"].update({9: {}}), "to other parameters"),
    "repeated parameter": (
        lambda s: s["param_groups"][0].update(params=[2, 2]),
        "to other parameters",
    ),
    "fewer parameters": (lambda s: s["param_groups"][0]["params"].pop(), "to other parameters"),
    "fewer groups": (lambda s: s["param_groups"].pop(), "to other parameters"),
    "unhashable": (lambda s: s["param_groups"][0].update(params=[[], []]), "damaged or"),
    "no groups": (lambda s: s.pop("param_groups"), "damaged"),
    "a list": (lambda s: s.update(state=[1]), "damaged"),
    "text for a state": (lambda s: s["state"].update({0: "state"}), "damaged"),
}


@pytest.mark.parametrize("change, reason", SPOILED.values(), ids=SPOILED)
def test_the_state_of_another_optimizer_is_refused(change, reason):
    optimizer = trained_optimizer()
    change(state := optimizer.state_dict())
    with pytest.raises(UserError, match=reason):
        check_optimizer_state(state, parameters_of(optimizer))


def test_a_state_that_is_no_dictionary_is_refused():
    with pytest.raises(UserError, match="damaged"):
        check_optimizer_state("state", [])


def test_parameters_correspond_by_position():
    """Saved numbers of parameters are only names."""
    optimizer = trained_optimizer()
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    state["param_groups"][0]["params"], state["param_groups"][1]["params"] = [7, 5], [0]
    state["state"] = {7: state["state"][0], 0: state["state"][2]}
    check_optimizer_state(state, parameters_of(optimizer))
    state["state"] = {0: state["state"][7], 7: state["state"][0]}
    with pytest.raises(UserError, match=r"\[2, 3\]"):
        check_optimizer_state(state, parameters_of(optimizer))
