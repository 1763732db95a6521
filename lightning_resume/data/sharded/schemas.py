"""One schema for parquet files that were not all written with the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import pyarrow as pa

_DIGITS = {16: 11, 32: 24, 64: 53}
"""Binary digits that a float of so many bits holds exactly."""


def unified(schemas: Iterable[tuple[str, pa.Schema]]) -> tuple[pa.Schema, dict[str, str]]:
    """One schema that holds what every file holds, and for columns that have no such type the reason.

    Args:
        schemas: Those of the files, by name of the file. The columns come in the order of the first; one that a file
            lacks is null there.
    """
    import pyarrow as pa

    fields: dict[str, pa.Field] = {}
    first: dict[str, str] = {}
    clashes: dict[str, str] = {}
    for number, (url, schema) in enumerate(_distinct(schemas)):
        lacking = set(fields) - set(schema.names)
        fields.update({name: fields[name].with_nullable(True) for name in lacking})
        for field in schema:
            if field.name not in fields:
                fields[field.name] = field.with_nullable(True) if number else field
                first[field.name] = url
            elif (found := _holding_both(fields[field.name], field)) is not None:
                fields[field.name] = found
            else:
                clashes.setdefault(field.name, _clash(fields[field.name], first[field.name], field, url))
    return pa.schema([field for name, field in fields.items() if name not in clashes]), clashes


def unpacked(schema: bytes) -> pa.Schema:
    """The schema of a saved table of files.

    Raises:
        ValueError: It is damaged.
    """
    import pyarrow as pa

    try:
        return pa.ipc.read_schema(pa.py_buffer(schema))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"The saved table of files is damaged ({error}): load another checkpoint.") from error


def _distinct(schemas: Iterable[tuple[str, pa.Schema]]) -> Iterable[tuple[str, pa.Schema]]:
    known: set[bytes] = set()
    for url, schema in schemas:
        bare = schema.remove_metadata()
        if (key := bare.serialize().to_pybytes()) not in known:
            known.add(key)
            yield url, bare


def _holding_both(one: pa.Field, other: pa.Field) -> pa.Field | None:
    """The field whose type holds all values of both, if there is one."""
    import pyarrow as pa

    one, other = _decoded(one, other.type), _decoded(other, one.type)
    try:
        both = pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None
    return both if _holds(both.type, one.type) and _holds(both.type, other.type) else None


def _decoded(field: pa.Field, beside: pa.DataType) -> pa.Field:
    """A column that is a dictionary in one file only is none."""
    import pyarrow as pa

    if pa.types.is_dictionary(field.type) and not pa.types.is_dictionary(beside):
        return field.with_type(field.type.value_type)
    return field


def _holds(wide: pa.DataType, narrow: pa.DataType) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``; Arrow also offers types that round, or are other things."""
    from pyarrow import types as are

    if wide == narrow or are.is_null(narrow):
        return True
    if are.is_integer(wide) and are.is_integer(narrow):
        return bool(wide.bit_width > narrow.bit_width) and (are.is_signed_integer(wide) or not _signed(narrow))
    if are.is_floating(wide) and (are.is_integer(narrow) or are.is_floating(narrow)):
        room = _DIGITS[wide.bit_width]
        return room >= (narrow.bit_width if are.is_integer(narrow) else _DIGITS[narrow.bit_width])
    if are.is_struct(wide) and are.is_struct(narrow):
        parts = {field.name: field.type for field in wide}
        return all(_holds(parts[field.name], field.type) for field in narrow)
    if _is_list(wide) and _is_list(narrow):
        return _holds(wide.value_type, narrow.value_type)
    if are.is_dictionary(wide) and are.is_dictionary(narrow):
        return _holds(wide.value_type, narrow.value_type)
    # a cast of these raises where a value does not fit, as dates in years beyond a finer unit's
    kinds = (_is_text, _is_binary, are.is_timestamp, are.is_duration, are.is_time, are.is_date, are.is_decimal)
    return any(kind(wide) and kind(narrow) for kind in kinds)


def _signed(kind: pa.DataType) -> bool:
    from pyarrow import types as are

    return bool(are.is_signed_integer(kind))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types as are

    return bool(are.is_list(kind) or are.is_large_list(kind) or are.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    from pyarrow import types as are

    return bool(are.is_string(kind) or are.is_large_string(kind))


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types as are

    return bool(are.is_binary(kind) or are.is_large_binary(kind) or are.is_fixed_size_binary(kind))


def _clash(one: pa.Field, first: str, other: pa.Field, url: str) -> str:
    return (
        f"Column {one.name!r} is {one.type} in {first} and {other.type} in {url}: no type holds both without loss."
        " Write one of them anew, or leave the column out by `columns`."
    )


@final
class Conforming:
    """Gives what is read of any file the columns and types that all have.

    Args:
        schema: Of all files; None where it is not known. A column that it does not know has the type that it is first
            read with, and another is an error.
        columns: Those that are read; all when None.
    """

    def __init__(self, schema: pa.Schema | None, columns: Sequence[str] | None) -> None:
        known: Mapping[str, pa.Field] = {} if schema is None else {field.name: field for field in schema}
        self._names: list[str] | None = None
        if columns is not None:
            tops = {name: name if name in known else name.split(".")[0] for name in columns}
            self._names = list(dict.fromkeys(tops.values()))
        self._known, self._whole = known, schema is not None
        self._partly = set(self._names or ()) - set(columns or ())
        """Structs of which only parts are read."""
        self._learned: dict[str, tuple[pa.Field, str]] = {}
        self._as_it_is: pa.Schema | None = None
        """Of a table that needed no change."""

    def __call__(self, table: pa.Table, url: str) -> pa.Table:
        if self._as_it_is is not None and table.schema.equals(self._as_it_is):
            return table
        made = shaped(table, [self._field(name, table, url) for name in self._names_of(table)], url)
        if made.schema.equals(table.schema):
            self._as_it_is = table.schema
        return made

    def _names_of(self, table: pa.Table) -> list[str]:
        if self._names is None and not self._whole:  # nobody knows what the other files have
            self._names = list(table.column_names)
        if self._names is not None:
            return self._names
        return [*self._known, *(name for name in table.column_names if name not in self._known)]

    def _field(self, name: str, table: pa.Table, url: str) -> pa.Field:
        if name in self._known and name in self._partly:
            field = self._known[name]
            return field.with_type(_narrowed(field.type, table.schema.field(name).type))
        if name in self._known:
            return self._known[name]
        if name not in table.column_names:
            raise ValueError(f"{url} has no column {name!r}; it has {table.column_names}. Correct `columns`.")
        here = table.schema.field(name).with_nullable(True).remove_metadata()
        field, first = self._learned.setdefault(name, (here, url))
        if field.type != here.type:
            raise ValueError(_clash(field, first, here, url))
        return field


def _narrowed(kind: pa.DataType, parts: pa.DataType) -> pa.DataType:
    """The type without what ``parts`` has not."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and pa.types.is_struct(parts):
        fields = {field.name: field for field in kind}
        return pa.struct([fields[part.name].with_type(_narrowed(fields[part.name].type, part.type)) for part in parts])
    if pa.types.is_list(kind) and _is_list(parts):
        return pa.list_(kind.value_field.with_type(_narrowed(kind.value_type, parts.value_type)))
    return kind


def shaped(table: pa.Table, fields: Sequence[pa.Field], url: str) -> pa.Table:
    """The table with just these columns, in types that hold its values."""
    import pyarrow as pa

    return pa.table([_column(table, field, url) for field in fields], schema=pa.schema(fields))


def _column(table: pa.Table, field: pa.Field, url: str) -> Any:
    import pyarrow as pa

    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table.column(field.name)
    try:
        return column if column.type == field.type else column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{url}: column {field.name!r} is {column.type}, and has to become {field.type} as in the other files:"
            f" {error}. Write the file anew."
        ) from error
