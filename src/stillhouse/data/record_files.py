"""A normalised task file as a sequence that reads each record from the disk when it is asked for.

For corpora that memory does not hold. A record costs 8 bytes, the place of its line, and 16 more while a digest tells
it from the others. Stands beside `records`, which reads files whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Generic

import numpy as np
from numpy.typing import NDArray

from stillhouse.assets.records import RecordType
from stillhouse.data.records import located_records, parse_record
from stillhouse.runtime.errors import UserError

DIGEST_BYTES = 16


class RecordFile(Generic[RecordType]):
    """The records of one file, in its order; opening it checks every line.

    Raises `UserError` for what `records.read_records` refuses, in its words.
    """

    def __init__(self, path: Path, kind: type[RecordType]) -> None:
        self.path, self.kind = path, kind
        self._offsets, ids = array("Q"), Digests()
        for offset, _, record in located_records(path, kind):
            self._offsets.append(offset)
            ids.add(record.id)
        if not ids.first_of_each.all():
            self._refuse_repeated(int(ids.first_of_each.argmin()))
        if not self._offsets:
            raise UserError(f"{path}: holds no examples: fill it, or correct the path")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> RecordType:
        self._file.seek(self._offsets[row])
        return parse_record(self._file.readline().decode(), self.kind, str(self.path))

    def __iter__(self) -> Iterator[RecordType]:
        return (record for _, _, record in located_records(self.path, self.kind))

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")

    def _refuse_repeated(self, row: int) -> None:
        for offset, number, record in located_records(self.path, self.kind):
            if offset == self._offsets[row]:
                raise UserError(f"{self.path}:{number}: the id '{record.id}' occurs twice: make the ids unique")


class Digests:
    """Digests of texts in the order they were added: which of them are repetitions, without the texts."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def add(self, text: str) -> None:
        """Take in one more text."""
        self._digests += blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()

    @property
    def first_of_each(self) -> NDArray[np.bool_]:
        """For each text, whether it is the first of its kind."""
        high, low = np.frombuffer(bytes(self._digests), np.uint64).reshape(-1, 2).T
        order = np.lexsort((low, high))  # stable: of equal ones the first stays in front
        repeated = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
        first = np.ones(len(order), dtype=np.bool_)
        first[order[1:][repeated]] = False
        return first
