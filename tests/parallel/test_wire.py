"""What goes to another process comes back as it was, as JSON and tensors; what is neither is refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from nbl_export.parallel.ranks import pack, unpack


@dataclass
class Pair:
    weight: np.ndarray
    bias: np.ndarray


def test_values_come_back() -> None:
    half = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    given = {
        "work": "x",
        "done": 3,
        4: [1.5, None, True, (half, "text")],
        "array": np.eye(2),
        "nested": {"a": {1: half}},
    }
    text, tensors = pack(given)
    json.loads(text)
    found = unpack(text, tensors)
    assert list(found) == list(given)
    assert found[4][:3] == [1.5, None, True]
    assert torch.equal(found[4][3][0], half) and found[4][3][0].dtype == torch.bfloat16
    assert np.array_equal(found["array"], np.eye(2)) and found["array"].dtype == np.float64
    assert torch.equal(found["nested"]["a"][1], half)


def test_a_dictionary_that_looks_like_a_tensor_stays_one() -> None:
    assert unpack(*pack({"tensor": 0, "pairs": [1]})) == {"tensor": 0, "pairs": [1]}


def test_a_dataclass_comes_as_its_fields() -> None:
    given = Pair(np.eye(2, dtype="f"), np.ones(2, "f"))
    found = unpack(*pack({0: given}))[0]
    assert list(found) == [field.name for field in dataclasses.fields(Pair)]
    assert np.array_equal(Pair(**found).weight, given.weight)


@pytest.mark.parametrize("value", [{1.5: 1}, {(1,): 1}, object(), b"bytes", {1, 2}, Pair])
def test_what_is_not_sent(value: object) -> None:
    with pytest.raises(TypeError):
        pack([value])
