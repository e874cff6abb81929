"""dpo/reference.py: oracles are the run without a cache, the count of reference passes, and files damaged by hand."""

import math
import random
import shutil
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.training.train import Item, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import Preference
from matryoshka.dpo.reference import ReferenceLogps, open_reference, reference_digest
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    copy_adapter,
    layers_with,
    set_active,
    trainable_parameters,
)
from matryoshka.lora.quantized import quantize_linears

CONFIG = TrainConfig(learning_rate=1e-2, epochs=3, batch_size=4, micro_batch_tokens=60, seed=7, save_every=1)
CPU = torch.device("cpu")


def pairs(count: int = 8) -> list[Item]:
    draws = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draws.randrange(256) for _ in range(length))

    items = []
    for index in range(count):
        prompt = ids(10)
        sides = (prompt + ids(draws.randint(1, 6)) for _ in range(2))
        items.append(Item(tuple(Tokens(s, (0,) * 10 + (1,) * (len(s) - 10)) for s in sides), f"example {index}"))
    return items


def make_model(folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, convert: Any = None) -> Any:
    """Return the tiny model with a policy that is not the identity and its frozen copy, the reference."""
    model: Any = load_model(folder, dtype, convert=convert)
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for layer in layers_with(model, "policy"):
            torch.nn.init.normal_(layer.lora_B["policy"], std=0.1, generator=torch.Generator().manual_seed(seed))
    copy_adapter(model, "policy", "reference")
    set_active(model, "policy")
    return model.eval()


class Run:
    """A training run whose reference passes are counted."""

    def __init__(self, tiny_dir: Path, folder: Path, cache: Path | None, **config: Any) -> None:
        self.model = make_model(tiny_dir)
        self.passes = 0
        self.parameters = trainable_parameters(self.model, "policy")
        objective = Preference()
        self.cache = open_reference(cache, tiny_dir, self.model, "reference") if cache else None
        self.rows = train(
            self.model, self.parameters, pairs(), replace(CONFIG, **config), objective, token_logps, folder,
            TrainContext(self.reference, objective.first_loss, self.cache),
        )  # fmt: skip

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.passes += 1
        with active(self.model, "reference"):
            yield

    def values(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self.parameters.values()]


def test_later_epochs_and_runs_need_no_reference_pass(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the run without a cache, within fp32 rounding (1e-5: another packing rounds otherwise); the count."""
    cache = tmp_path / "new folder" / "c"
    plain, first = Run(tiny_dir, tmp_path / "plain", None), Run(tiny_dir, tmp_path / "first", cache)
    expected, rows = ([next(run.rows) for _ in range(2)] for run in (plain, first))  # one epoch
    assert first.passes == plain.passes > 2
    after_epoch = first.passes
    for run, found in ((plain, expected), (first, rows)):
        found += run.rows
    # What opened the run is computed to check the loss, and stored when it comes round again.
    assert after_epoch < first.passes <= after_epoch + 2 < plain.passes
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("loss", "margin", "grad_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    again = Run(tiny_dir, tmp_path / "again", cache, learning_rate=1e-3)
    row = next(again.rows)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert again.passes == 4 + 1  # four items verified, the first micro-batch computed
    list(again.rows)
    assert again.passes == 4 + 1


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_resumed_run_has_the_same_bits(tiny_dir: Path, tmp_path: Path, stop_after: int) -> None:
    """Oracle: the uninterrupted run with a cache of its own."""
    whole = Run(tiny_dir, tmp_path / "whole", tmp_path / "whole.sqlite")
    list(whole.rows)
    part = Run(tiny_dir, tmp_path / "part", tmp_path / "part.sqlite")
    for _ in range(stop_after):
        next(part.rows)
    part.rows.close()  # type: ignore[attr-defined]
    part = Run(tiny_dir, tmp_path / "part", tmp_path / "part.sqlite")
    assert len(list(part.rows)) == 6 - stop_after
    for one, two in zip(part.values(), whole.values(), strict=True):
        assert one.equal(two)


def filled(path: Path, items: list[Item], value: float = -1.5) -> ReferenceLogps:
    """Return a cache that holds `value` for every scored token of `items`."""
    cache = ReferenceLogps(path, "digest", torch.float32, CPU)
    count = sum(sum(s.mask) for item in items for s in item.sequences)
    cache.get(items, lambda: torch.full((count,), value))
    return cache


def never() -> Tensor:
    raise AssertionError("nothing was missing")


def test_rows_are_found_and_never_replaced(tmp_path: Path) -> None:
    """Oracle: by hand: stored values come back to the bit, in any order, and later computations do not change them."""
    items = pairs(3)
    counts = [sum(sum(s.mask) for s in item.sequences) for item in items]
    values = torch.randn(counts[0] + counts[1], generator=torch.Generator().manual_seed(0))
    with ReferenceLogps(tmp_path / "c", "digest", torch.float32, CPU) as cache:
        assert cache.get(items[:2], lambda: values).equal(values)
        swapped = torch.cat(torch.split(values, counts[:2])[::-1])
        assert cache.get(items[1::-1], never).equal(swapped)
    with ReferenceLogps(tmp_path / "c", "digest", torch.float32, CPU) as cache:
        new = torch.zeros(sum(counts))
        found = cache.get(items, lambda: new)  # one is missing: all are computed, only that one is stored
        assert found.equal(torch.cat((values, new[len(values) :])))
    exact = torch.tensor([math.pi] * counts[0], dtype=torch.float64)
    with ReferenceLogps(tmp_path / "c", "other", torch.float64, CPU) as cache:
        assert cache.get(items[:1], lambda: exact).equal(exact)
        assert cache.get(items[:1], never).equal(exact)


def test_the_key_holds_all_that_decides(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: another base, adapter, adapter's scale, dtype, token or mask is another key."""
    model = make_model(tiny_dir)
    digests = {
        reference_digest(tiny_dir, model, "reference"),
        reference_digest(tiny_dir, model, None),
        reference_digest(tiny_dir, make_model(tiny_dir, seed=2), "reference"),
        reference_digest(tiny_dir, make_model(tiny_dir, dtype=torch.bfloat16), "reference"),
    }
    for name, change in (("config.json", b" "), ("model.safetensors", b"\0")):
        other = tmp_path / name
        shutil.copytree(tiny_dir, other)
        with (other / name).open("ab") as handle:
            handle.write(change)
        digests.add(reference_digest(other, model, "reference"))
    for layer in layers_with(model, "reference"):
        layer.configs["reference"] = replace(layer.configs["reference"], alpha=8.0)
    digests.add(reference_digest(tiny_dir, model, "reference"))
    assert len(digests) == 7
    assert reference_digest(tiny_dir, make_model(tiny_dir), "reference") in digests

    sequence = Tokens((1, 2, 3, 4), (0, 0, 1, 1))
    filled(tmp_path / "c", [Item((sequence,), "a")])
    with ReferenceLogps(tmp_path / "c", "digest", torch.float32, CPU) as cache:
        assert cache.get([Item((sequence,), "another group")], never).tolist() == [-1.5, -1.5]
        for other_sequence in (Tokens((1, 2, 3, 5), sequence.mask), Tokens(sequence.ids, (0, 1, 0, 1))):
            assert cache.get([Item((other_sequence,), "a")], lambda: torch.zeros(2)).tolist() == [0, 0]


def test_a_quantised_base_has_a_key_of_its_own(tiny_dir: Path) -> None:
    """Oracle: by hand: the same files in four bits are another reference, the same one every time."""
    pytest.importorskip("bitsandbytes")
    digests = [
        reference_digest(tiny_dir, make_model(tiny_dir, convert=convert), "reference")
        for convert in (None, quantize_linears, quantize_linears)
    ]
    assert digests[0] != digests[1] == digests[2]


def test_stored_rows_that_the_model_does_not_compute_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: rows written by hand, whole by their checksum, 0.1 nats off; the run stops before its first step."""
    first = Run(tiny_dir, tmp_path / "one", tmp_path / "c")
    list(first.rows)
    assert first.cache is not None
    with first.cache:
        pass
    with sqlite3.connect(tmp_path / "c") as db:
        for key, row in db.execute("SELECT key, row FROM logps").fetchall():
            moved = (np.frombuffer(row, np.float32) + np.float32(0.1)).tobytes()
            db.execute("UPDATE logps SET row = ?, crc = ? WHERE key = ?", (moved, zlib.crc32(key + moved), key))
    db.close()
    second = Run(tiny_dir, tmp_path / "two", tmp_path / "c")
    before = second.values()
    with pytest.raises(ValueError, match=r"c: the stored log-probs of example 'example \d' are 0.1 nats .* move the"):
        next(second.rows)
    assert all(one.equal(two) for one, two in zip(second.values(), before, strict=True))


def test_verification_takes_random_rows(tmp_path: Path) -> None:
    """Oracle: the count: four of those that are stored, none where there are none."""
    items = pairs(12)
    cache = filled(tmp_path / "c", items[::2])
    seen: list[str] = []

    def compute(item: Item) -> Tensor:
        seen.append(item.group)
        return torch.full((sum(sum(s.mask) for s in item.sequences),), -1.5)

    cache.verify(items, compute)
    stored = [item.group for item in items[::2]]
    assert len(set(seen)) == 4 and set(seen) < set(stored) and sorted(seen) != sorted(stored[:4])
    seen.clear()
    cache.verify(items[1::2], compute)
    assert seen == []
    with pytest.raises(ValueError, match="are nan nats"):
        cache.verify(items, lambda item: compute(item) * math.nan)


@pytest.mark.parametrize("damage", ["row", "length", "header", "text", "other"])
def test_damaged_files_are_refused_and_left(tmp_path: Path, damage: str) -> None:
    """Oracle: the message; the file's bytes are unchanged."""
    path, items = tmp_path / "c", pairs(1)
    with filled(path, items):
        pass
    if damage in ("row", "length"):
        with sqlite3.connect(path) as db:
            key, row = db.execute("SELECT key, row FROM logps").fetchone()
            row = bytes([row[0] ^ 1]) + row[1:] if damage == "row" else row[:-4]
            crc = "crc" if damage == "row" else str(zlib.crc32(key + row))
            db.execute(f"UPDATE logps SET row = ?, crc = {crc} WHERE key = ?", (row, key))
        db.close()
        message = "the row [0-9a-f]{64} is damaged; move the file away"
    elif damage == "other":
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE things (thing TEXT)")
        db.close()
        message = "an SQLite file of another program; choose another path"
    else:
        data = path.read_bytes()
        path.write_bytes(b"not a database" * 100 if damage == "text" else data[:100] + b"\xff" * 200 + data[300:])
        message = "not a readable cache of reference log-probs .* it was left as it is"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        with ReferenceLogps(path, "digest", torch.float32, CPU) as cache:
            cache.get(items, never)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="cannot use the cache of reference log-probs"):
        ReferenceLogps(tmp_path, "digest", torch.float32, CPU)


def test_what_was_not_committed_was_never_there(tmp_path: Path) -> None:
    """Oracle: by hand: a transaction that a kill cut off leaves the rows before it, and no half of its own."""
    items = pairs(2)
    with filled(tmp_path / "c", items[:1]) as cache:
        cache._db.execute("BEGIN IMMEDIATE")
        cache._db.execute("INSERT INTO logps VALUES (x'00', x'00', 0)")
    with ReferenceLogps(tmp_path / "c", "digest", torch.float32, CPU) as cache:
        assert cache._db.execute("SELECT count(*) FROM logps").fetchone() == (2,)
        cache.get(items[:1], never)


def test_caching_works_without_adapters(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: ln 2 where the reference is the base model (adapters off) and the policy starts as the identity."""
    model: Any = load_model(tiny_dir)
    add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
    set_active(model, "policy")
    parameters = trainable_parameters(model, "policy")
    with open_reference(tmp_path / "c", tiny_dir, model, None) as cache:
        context = partial(active, model, None)
        rows = train(
            model, parameters, pairs(4), CONFIG, Preference(), token_logps, tmp_path / "run",
            TrainContext(context, math.log(2), cache),
        )  # fmt: skip
        assert next(rows)["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert len(list(rows)) == 2
