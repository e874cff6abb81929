"""core/packed.py: the oracle is the tuple of the same numbers."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.core.models.tree import Tokens
from matryoshka.core.packed import Packed
from matryoshka.core.records import Judgement, Sample, Turn, content_key, from_json, to_json

integers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 1) | st.integers(0, 10**5)).map(tuple)
numbers = integers | st.lists(st.floats(allow_nan=False)).map(tuple)


@given(numbers, numbers, st.slices(8))
def test_a_packed_sequence_is_its_tuple(one: tuple[int, ...], two: tuple[int, ...], part: slice) -> None:
    """Oracle: the tuple: equality both ways, hash, order, slices, printing, numpy, pickle and copies."""
    packed = Packed(one)
    assert packed == one and one == packed and hash(packed) == hash(one) and packed in {one}
    assert (packed == two) == (one == two) == (Packed(two) == packed) and (packed < Packed(two)) == (one < two)
    assert packed[part] == one[part] and (*packed, *packed) == one + one and len(packed) == len(one)
    assert repr(packed) == repr(one) and all(map(isinstance, packed, map(type, one)))
    assert pickle.loads(pickle.dumps(packed)) == copy.deepcopy(packed) == Packed(packed) == one
    assert np.array_equal(np.array(packed), np.array(one)) and bool(packed) == bool(one)
    assert packed != list(one) and list(packed) == list(one)


def test_a_packed_sequence_cannot_be_changed() -> None:
    """Oracle: the errors of a tuple; an array made of it is a copy."""
    packed = Packed((1, 2, 3))
    np.asarray(packed)[0] = 9
    assert packed == (1, 2, 3) and packed.index(2) == 1
    with pytest.raises(TypeError):
        packed[0] = 9  # type: ignore[index]
    with pytest.raises(IndexError):
        packed[3]


def test_records_keep_few_bytes_a_token() -> None:
    """Oracle: by hand: 4 bytes an id, 8 a log-prob, 1 a mask entry; JSON and keys are those of tuples."""
    ids, mask = tuple(range(1000, 2000)), (0, 1) * 500
    tokens = Tokens(ids, mask)
    sample = Sample("a", "stop", ids, (-0.5,) * 1000, mask)
    fields: list[Any] = [tokens.ids, tokens.mask, sample.token_ids, sample.logprobs, sample.mask]
    assert [field._array.itemsize for field in fields] == [4, 1, 4, 8, 1]
    turn = Turn((), ids, sample)
    data = to_json(turn)
    assert data["prompt_ids"] == list(ids) and data["action"]["mask"] == list(mask)
    assert from_json(Turn, data) == turn and hash(from_json(Turn, data)) == hash(turn)
    assert content_key(tokens.ids) == content_key(ids)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", [1, "2"], r"Sample.token_ids\[1\]: expected int, got str"),
        ("token_ids", [1, True], r"Sample.token_ids\[1\]: expected int, got bool"),
        ("token_ids", [1, 2.0], r"Sample.token_ids\[1\]: expected int, got float"),
        ("token_ids", [1, 2**64], r"Sample: .*64 bits"),
        ("token_ids", "12", "Sample.token_ids: expected a list, got str"),
        ("logprobs", [0.5, None], r"Sample.logprobs\[1\]: expected float, got NoneType"),
        ("logprobs", [0.5, 10**400], "Sample: .*"),
        ("usage", {"prompt_tokens": "7"}, "Sample.usage.prompt_tokens: expected int, got str"),
    ],
)
def test_other_things_than_numbers_are_refused(name: str, value: object, message: str) -> None:
    """Oracle: the message names the field and the place."""
    with pytest.raises(ValueError, match=message):
        from_json(Sample, {"text": "", name: value})
    with pytest.raises(ValueError, match="Judgement.reward: expected float, got int"):
        from_json(Judgement, {"prediction": None, "verdict": "right", "reward": 10**400})
