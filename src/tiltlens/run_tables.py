"""The columns of a run folder, and pure functions of its tables: no file is touched here."""

import json
import math
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

KEY = ("unit", "strength", "seed")  # the name of a sample
STEP_KEY = (*KEY, "step")


def _schema(required: str, numbers: str, *others: pa.Field) -> pa.Schema:
    """Required columns may hold no null; numbers are float64; another type is given as name:type."""
    fields = []
    for word in required.split():
        name, _, kind = word.partition(":")
        fields.append(pa.field(name, pa.type_for_alias(kind or "float64"), nullable=False))
    return pa.schema([*fields, *(pa.field(name, pa.float64()) for name in numbers.split()), *others])


SAMPLES = _schema(
    "unit:string strength seed:int64 activation energy finite:bool",
    "z log_w path_kl clipped seconds",
    pa.field("image", pa.string()),
    pa.field(
        "group", pa.int64()
    ),  # particles: the first seed of the row's group; these four are null for other rows
    pa.field("weight", pa.float64()),  # its share in the group
    pa.field("copies", pa.int64()),  # how often it stands in the group's equally weighted output
    pa.field("ancestor", pa.int64()),  # the seed in whose state its path began
)
STEPS = _schema(
    "unit:string strength seed:int64 step:int64 t:int64", "log_snr guidance_norm path_kl_step ess ancestors"
)
CURVE = _schema(
    "unit:string strength n:int64",
    "activation_mean activation_se z_mean z_se energy_mean energy_se path_kl path_kl_se kl_lower kl_lower_se "
    "kl kl_se log_z log_z_se ess gap gap_se efficiency nonfinite seconds",
    pa.field("kl_method", pa.string()),
)
_STEP = pa.struct([field for field in STEPS if field.name not in KEY])
PART = SAMPLES.append(pa.field("steps", pa.list_(_STEP)))  # one file holds both, so neither is ever alone


def as_table(rows: Iterable[dict], schema: pa.Schema, what: str, extra: bool = False) -> pa.Table:
    """Rows (dicts by column name) as a table of this schema; columns that may be null may be left out.

    extra: keep columns that the schema does not know, after its own; else they are refused.
    Raises ValueError naming the columns that are unknown, missing, or of a wrong type.
    """
    rows = list(rows)
    given = list(dict.fromkeys(name for row in rows for name in row))
    unknown = [name for name in given if name not in schema.names]
    if unknown and not extra:
        raise ValueError(f"{what}: unknown columns {unknown}; expected {schema.names}")
    for field in schema:
        if not field.nullable and any(row.get(field.name) is None for row in rows):
            raise ValueError(f"{what}: every row needs a value in column {field.name!r}")
    try:
        table = pa.Table.from_pylist([{k: _plain(v) for k, v in row.items()} for row in rows], schema=schema)
        for name in unknown:
            table = table.append_column(name, pa.array([_plain(row.get(name)) for row in rows]))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{what}: {error}; expected the types\n{schema}") from error
    return table


def _plain(value):
    """NumPy scalars and one-element tensors as Python numbers; everything else as it is."""
    return value.item() if hasattr(value, "item") else value


def names_of(table: pa.Table) -> list[tuple[str, float, int]]:
    """(unit, strength, seed) of every row."""
    return list(zip(*(table[column].to_pylist() for column in KEY)))


def join_part(rows: list[dict], steps: Iterable[dict]) -> pa.Table:
    """One table with the steps of a sample as a list in its row. Raises ValueError for a step of no row."""
    samples = as_table(rows, SAMPLES, "rows of samples")
    steps = merge([as_table(steps, STEPS, "rows of steps")], STEPS, STEP_KEY)
    of = {name: [] for name in names_of(samples)}
    for name, step in zip(names_of(steps), steps.drop_columns(list(KEY)).to_pylist()):
        if name not in of:
            raise ValueError(f"a step of {name} was given without its row; a part holds both")
        of[name].append(step)
    field = PART.field("steps")
    return samples.append_column(field, pa.array([of[name] for name in names_of(samples)], field.type))


def steps_of(part: pa.Table) -> pa.Table:
    """The steps of a part, a row each."""
    part = part.combine_chunks()
    parents = np.repeat(np.arange(part.num_rows), pc.list_value_length(part["steps"]).to_numpy())
    steps = part["steps"].chunks
    flat = pa.Table.from_batches(
        [pa.RecordBatch.from_struct_array(chunk.flatten()) for chunk in steps],
        pa.schema(list(part.schema.field("steps").type.value_type)),
    )
    named = part.select(list(KEY)).take(parents)
    return conform(pa.table({**{k: named[k] for k in KEY}, **{k: flat[k] for k in flat.column_names}}), STEPS)


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of the schema, and no others; one that may be null and that an older file does not have is null."""
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(schema.names).cast(schema)


def merge(tables: Iterable[pa.Table], schema: pa.Schema, key: tuple[str, ...]) -> pa.Table:
    """All rows, sorted by key, each key once; among equal keys the row of the last table stays."""
    table = pa.concat_tables([schema.empty_table(), *(conform(t, schema) for t in tables)])
    ranks = np.stack([np.unique(table[k].to_numpy(), return_inverse=True)[1] for k in key])
    order = np.lexsort(ranks[::-1])  # a stable sort: among equals, later rows stay later
    last = np.ones(len(order), dtype=bool)
    last[:-1] = (np.diff(ranks[:, order], axis=1) != 0).any(0)
    return table.take(order[last])


def finite(value):
    """JSON knows neither NaN nor infinity: both are null. NumPy numbers and tensors become Python's."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: dict) -> str:
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def differences(stored: dict, asked: dict, at: str = "") -> Iterator[str]:
    """One line, `dotted.key: stored against asked`, for every leaf in which two JSON dicts differ."""
    for key in sorted({*stored, *asked}):
        old, new = stored.get(key, _ABSENT), asked.get(key, _ABSENT)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{at}{key}.")
        elif old is _ABSENT or new is _ABSENT or old != new:
            yield f"{at}{key}: {_show(old)} in the folder, {_show(new)} asked for"


_ABSENT = object()


def _show(value) -> str:
    return "not set" if value is _ABSENT else repr(value)
