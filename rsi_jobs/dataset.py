"""Round datasets: Parquet that `datasets.load_dataset("parquet", data_files=...)` opens, images decoded.

One row a candidate: image, prompt, seed, every score, selected, weight. Images are PNG bytes in the
layout of the `datasets` library's Image feature, named in the file's metadata.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_DTYPES = {pa.string(): "string", pa.bool_(): "bool", pa.int64(): "int64", pa.int32(): "int32",
           pa.float32(): "float32", pa.float64(): "float64"}  # fmt: skip


def png(image: np.ndarray) -> bytes:
    """PNG bytes of an image (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of PNG bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def images_column(images: Sequence[np.ndarray], names: Sequence[str]) -> pa.Array:
    parts = [pa.array([png(image) for image in images], pa.binary()), pa.array(list(names), pa.string())]
    return pa.StructArray.from_arrays(parts, names=["bytes", "path"])


def table(columns: Mapping[str, Any]) -> pa.Table:
    """An Arrow table from arrays, lists and Arrow arrays of one length."""
    arrays = {
        name: value if isinstance(value, (pa.Array, pa.ChunkedArray)) else pa.array(_plain(value))
        for name, value in columns.items()
    }
    return pa.table(arrays)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "OU" else value
    return list(value)


def text(values: Iterable[str]) -> pa.Array:
    """A text column, also where there are no rows."""
    return pa.array(list(values), pa.string())


def write(path: Path, rows: pa.Table) -> None:
    """Write Parquet whose metadata tells `datasets` which columns are images. Bytes depend on the rows only."""
    features: dict[str, Any] = {}
    for field in rows.schema:
        if field.type == IMAGE:
            features[field.name] = {"_type": "Image"}
        else:
            features[field.name] = {"dtype": _DTYPES[field.type], "_type": "Value"}
    info = json.dumps({"info": {"features": features}})
    rows = rows.replace_schema_metadata({"huggingface": info})
    pq.write_table(rows, path, compression="zstd", row_group_size=256)


def read(path: Path, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns as arrays of one length; text as objects. Images are left out unless asked for, as PNG bytes."""
    file = pq.ParquetFile(path)
    wanted = [f.name for f in file.schema_arrow if f.type != IMAGE] if columns is None else list(columns)
    found = file.read(columns=wanted)
    result: dict[str, np.ndarray] = {}
    for name in wanted:
        column = found.column(name)
        if column.type == IMAGE:
            result[name] = np.array([row["bytes"] for row in column.to_pylist()], dtype=object)
        elif column.type == pa.string():
            result[name] = np.array(column.to_pylist(), dtype=object)
        else:
            result[name] = column.to_numpy()
    return result


def read_arrow(path: Path) -> pa.Table:
    return pq.read_table(path)


def concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of several tables with the same columns, in order. Empty parts may lack rows, not columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
