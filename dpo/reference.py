"""Reference log-probs on disk: a content-addressed cache, so that those of a frozen policy are computed once.

Epochs after the first, learning rates that are tried in turn and runs that start over need no reference pass. The key
of a sequence is the hash of everything that its log-probs follow from: the base model's files, the reference adapter,
dtype, device and kernels, token ids and mask. Rows are never replaced, so a run that is continued reads what it read
before. The key leaves out packing, which changes the last bits: a row holds the rounding of the batch in which it was
first computed.
"""

import hashlib
import random
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from matryoshka.core.database import Schema, database_errors, open_database, transaction
from matryoshka.core.distributed import ALONE, World
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.tree import Tokens
from matryoshka.core.models.weights import files_digest
from matryoshka.core.records import stable_seed
from matryoshka.core.training.packing import Item
from matryoshka.lora.files import adapter_digest
from matryoshka.lora.linear import LoraLinear

KERNELS = 1  # raise it with any change to the code that moves log-probs by more than rounding
APPLICATION_ID = 0x4D545246  # in SQLite's header: this file is ours
SCHEMA = Schema(
    name="cache of reference log-probs",
    application_id=APPLICATION_ID,
    statements=("CREATE TABLE logps (key BLOB PRIMARY KEY, row BLOB NOT NULL, crc INTEGER NOT NULL)",),
)
NUM_VERIFIED = 4  # items that are computed again when a run begins
# Root mean square over an item's tokens that other packings and kernels may differ by, in nats.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.2}


def reference_digest(base: Path, model: LanguageModel, adapter: str | None) -> str:
    """Return the hash of what computes the reference: files of `base`, which of their weights are quantised, adapter of
    that name, dtype, device, kernels.

    base: the Hugging Face folder that `model` was loaded from; adapter None: adapters off. Reads every weight once.
    """
    digest = hashlib.sha256(f"{KERNELS} {torch.__version__} {model.dtype} {model.device.type}".encode())
    digest.update(files_digest(base).encode())
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLinear)]
    if packed := [path for path, layer in layers if layer.scales is not None]:
        digest.update(f"nf4 {packed}".encode())
    if adapter is not None:
        digest.update(adapter_digest(model, adapter).encode())
    return digest.hexdigest()


def open_reference(
    path: Path, base: Path, model: LanguageModel, adapter: str | None, world: World = ALONE
) -> "ReferenceLogps":
    """Return the cache in `path` for the reference that `model` computes with `adapter`; raises as `ReferenceLogps`.

    world: the ranks that share the file; the first one reads the base model's files for all.
    """
    digest = torch.zeros(32, dtype=torch.uint8, device=world.device)
    if world.is_first:
        digest += torch.tensor(list(bytes.fromhex(reference_digest(base, model, adapter))), dtype=torch.uint8)
    world.sum([digest])
    return ReferenceLogps(path, bytes(digest.tolist()).hex(), model.dtype, model.device)


class ReferenceLogps:
    """An SQLite table of log-probs by key; a context manager. Processes may share the file, each through its own."""

    def __init__(self, path: Path, digest: str, dtype: torch.dtype, device: torch.device) -> None:
        """Open or create `path`. digest: `reference_digest`; dtype: the model's; device: of the tensors returned.

        Raises ValueError, leaving the file as it is, when it is not such a cache.
        """
        self.path = path
        self._digest, self._tolerance, self._device = digest, TOLERANCE[dtype], device
        self._dtype = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self._db = open_database(path, SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def get(self, items: Sequence[Item], compute: Callable[[], Tensor], agree: Callable[[bool], bool] = bool) -> Tensor:
        """Return the [S] log-probs of the items' scored tokens, in order.

        Where one is missing, `compute` is asked for all of them, those that were missing are stored, and what is then
        in the file counts: another process may have been first. agree: says whether to compute, from whether one is
        missing here: ranks that compute together decide together.
        """
        sequences = [sequence for item in items for sequence in item.sequences]
        rows = self._stored(sequences)
        if agree(len(rows) < len(sequences)):
            self._put(sequences, compute().detach().cpu())
            rows = self._stored(sequences)
        return torch.cat(rows).to(self._device)

    def verify(self, items: Sequence[Item], compute: Callable[[Item], Tensor]) -> None:
        """Compute up to NUM_VERIFIED random ones of the stored items again and compare.

        Raises ValueError naming the example where the two differ by more than rounding.
        """
        order = list(items)
        random.Random(stable_seed("verify", self._digest)).shuffle(order)
        left = NUM_VERIFIED
        for item in order:
            stored = self._stored(item.sequences)
            if len(stored) < len(item.sequences):
                continue
            difference = (torch.cat(stored) - compute(item).cpu()).double().square().mean().sqrt().item()
            if not difference <= self._tolerance:
                raise ValueError(
                    f"{self.path}: the stored log-probs of example {item.group!r} are {difference:.2g} nats (root mean "
                    f"square) from what the model computes, more than {self._tolerance:g}: they were written by other "
                    "code or another machine; move the file away to start anew"
                )
            left -= 1
            if not left:
                return

    def _key(self, sequence: Tokens) -> bytes:
        ids, mask = np.array(sequence.ids, dtype="<i8"), np.array(sequence.mask, dtype=np.uint8)
        return hashlib.sha256(self._digest.encode() + ids.tobytes() + mask.tobytes()).digest()

    def _stored(self, sequences: Sequence[Tokens]) -> list[Tensor]:
        """Return the rows of `sequences` that are in the file, in order."""
        rows = (self._row(sequence) for sequence in sequences)
        return [row for row in rows if row is not None]

    def _row(self, sequence: Tokens) -> Tensor | None:
        key = self._key(sequence)
        with self._errors():
            found = self._db.execute("SELECT row, crc FROM logps WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        row, checksum = found
        if zlib.crc32(key + row) != checksum or len(row) != sum(sequence.mask) * self._dtype.itemsize:
            raise ValueError(f"{self.path}: the row {key.hex()} is damaged; move the file away to start anew")
        return torch.from_numpy(np.frombuffer(row, self._dtype).copy())

    def _put(self, sequences: Sequence[Tokens], logps_S: Tensor) -> None:
        """Store the rows of `sequences` in one transaction; rows that are there stay."""
        values = []
        for sequence, part in zip(sequences, torch.split(logps_S, [sum(s.mask) for s in sequences]), strict=True):
            key, row = self._key(sequence), part.numpy().astype(self._dtype).tobytes()
            values.append((key, row, zlib.crc32(key + row)))
        with self._errors():
            with transaction(self._db):
                self._db.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?, ?)", values)

    def _errors(self) -> AbstractContextManager[None]:
        return database_errors(self.path, SCHEMA)
