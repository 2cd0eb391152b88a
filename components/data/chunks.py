"""Rows in chunks of one size, so that nothing depends on how a source cuts its batches."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

CHUNK_ROWS = 32_768
"""Rows of every chunk of a split but the last."""


def rechunk(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Cut rows anew: every chunk but the last has :data:`CHUNK_ROWS` rows, in one piece.

    Args:
        batches: Batches of ``schema``, of any size.
        schema: Their columns.
    """
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        start = 0
        while count + batch.num_rows - start >= CHUNK_ROWS:
            end = start + CHUNK_ROWS - count
            waiting.append(batch.slice(start, end - start))
            yield _joined(waiting, schema)
            waiting, count, start = [], 0, end
        if start < batch.num_rows:
            waiting.append(batch.slice(start))
            count += batch.num_rows - start
    if count:
        yield _joined(waiting, schema)


def chunk_count(rows: int) -> int:
    """How many chunks so many rows fill."""
    return -(-rows // CHUNK_ROWS)


def _joined(parts: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(parts, schema=schema).combine_chunks()
