"""Lists the audio in tar shards, Parquet files and Hugging Face data sets on disk, as one row each.

The audio itself is not read here: a row has its location. Rows before the damage in a damaged container are kept.
"""

import functools
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from af3pipe import storage
from af3pipe.schemas import Reason, Rejected, Stage
from af3pipe.storage.members import Cell, Span, identity
from af3pipe.storage.parquet import ParquetFile
from af3pipe.transforms.inputs.manifest import Row, is_binary, manifest_rows
from af3pipe.transforms.inputs.own_files import is_own_record, is_own_table, refuse_own_file, skip_own_file

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_PACKED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_BLOCK_BYTES = 512
_MOST_TEXT_BYTES = 4 << 20
_TEXTS = ("txt", "cls")
_ARROW_FILE = b"ARROW1\0\0"
_ROWS_AT_ONCE = 256


def container_rows(uri: str, *, named: bool = True) -> Callable[[storage.ObjectInfo], Iterator[Row]] | None:
    """Returns a function that lists the rows of a container; None if the name is not that of a container.

    The function's iterator yields the readable rows, and then raises Rejected if the container is damaged.

    Args:
        uri: URI of the object.
        named: Whether the user gave this object itself as input, and not a folder or glob that contains it. A file of
            an af3pipe output raises Rejected (unsupported_format) if so; else it is skipped, logged and counted.
    """
    if is_own_record(uri):
        return lambda found: (refuse_own_file if named else skip_own_file)(found.uri)
    name = uri.lower()
    if name.endswith(".tar"):
        return _tar_rows
    if name.endswith(_PACKED):
        return _refuse_packed
    if name.endswith(".parquet"):
        return functools.partial(_parquet_rows, named=named)
    return _arrow_rows if name.endswith(".arrow") else None


def arrow_rows(uri: str) -> Iterator[Row]:
    """Yields the rows of a data set's Arrow file, whatever its name. Raises Rejected like `container_rows`."""
    yield from _arrow_rows(storage.stat(uri))


def dataset_files(folder: str) -> list[str] | None:
    """Returns the Arrow files of a Hugging Face data set on disk (`save_to_disk`); None if the folder is none.

    Raises:
        Rejected: The files that describe the data set are invalid.
    """
    if splits := _described(folder, "dataset_dict.json"):
        folders = [storage.join(folder, _checked_name(str(split), folder)) for split in splits.get("splits", [])]
        return [file for split in folders for file in dataset_files(split) or _no_dataset(split)]
    if state := _described(folder, "state.json"):
        names = [str(file["filename"]) for file in state["_data_files"]]
        return [storage.join(folder, _checked_name(name, folder)) for name in names]
    return None


def _no_dataset(folder: str) -> list[str]:
    raise _bad(f"{folder} is listed as a split of a data set, but has no state.json")


def _checked_name(name: str, folder: str) -> str:
    """Checks a file name from a data set's description, which may come from an untrusted source; returns it."""
    if re.search(r"[/\\#]", name) or name in ("", ".", ".."):
        raise _bad(f"the data set {folder} lists {name!r}, which is not a file in its folder")
    return name


def _described(folder: str, name: str) -> dict[str, Any] | None:
    try:
        data = storage.read_bytes(storage.join(folder, name))
    except Rejected:  # it does not exist or cannot be read: the folder is listed like any other
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        raise _bad(f"{storage.join(folder, name)} is not JSON: {error}") from error
    is_dataset = isinstance(found, dict) and ("splits" in found or "_data_files" in found)
    return found if is_dataset else None


# --- tar ---


class _Sample(NamedTuple):
    """Groups the members of a tar whose names are equal up to the first dot."""

    key: str
    audio: list[Span]
    links: list[str]
    texts: dict[str, bytes | None]


def _refuse_packed(shard: storage.ObjectInfo) -> Iterator[Row]:
    yield from ()
    raise _bad(
        f"{shard.uri} is compressed as a whole, so that reading a member would mean reading all that is before it. "
        "Unpack it to a plain .tar first"
    )


def _tar_rows(shard: storage.ObjectInfo) -> Iterator[Row]:
    """Yields the rows of a WebDataset tar, in which members with equal names up to the first dot are one sample."""
    with storage.open_version(shard) as file:
        if file.read(8).startswith(_PACKED_MAGIC):
            yield from _refuse_packed(shard)
        for sample in _samples(file, shard):
            yield from _sample_rows(sample, shard)


def _samples(file: BinaryIO, shard: storage.ObjectInfo) -> Iterator[_Sample]:
    sample: _Sample | None = None
    damage: Rejected | None = None
    members = _members(file, shard)
    while True:
        try:
            info = next(members, None)
        except Rejected as rejected:
            info, damage = None, rejected
        key = _key(info.name) if info else None
        if sample is not None and key != sample.key:
            yield sample
            sample = None
        if info is None or key is None:
            break
        sample = sample or _Sample(key, [], [], {})
        extension = PurePosixPath(info.name).suffix[1:].lower()
        if extension in storage.AUDIO_EXTENSIONS and not info.isreg():
            sample.links.append(info.name)
        elif extension in storage.AUDIO_EXTENSIONS:
            sample.audio.append(Span(shard.uri, info.offset_data, info.size, info.name))
        elif extension == "json" or info.name[len(key) + 1 :] in _TEXTS:
            file.seek(info.offset_data)
            sample.texts[extension] = file.read(info.size) if info.size <= _MOST_TEXT_BYTES else None
    if damage is not None:
        raise damage


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _members(file: BinaryIO, shard: storage.ObjectInfo) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar except folders; raises if it is damaged, where `tarfile` would silently end."""
    size_bytes = file.seek(0, 2)
    file.seek(0)
    if size_bytes == 0:
        raise Rejected(Stage.LIST, Reason.EMPTY_FILE, f"{shard.uri} is empty")
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps all members in memory
                position = info.offset
                if info.offset_data + info.size > size_bytes:
                    what = f"its member {_shown(info.name)} goes on to byte {info.offset_data + info.size}"
                    raise _bad(f"{shard.uri} is cut off: it ends at byte {size_bytes}, but {what}")
                if not info.isdir():
                    yield info
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise _bad(f"{shard.uri} is damaged after byte {position}: {error}") from error
    file.seek(end)
    block = file.read(_BLOCK_BYTES)
    if not block:
        raise _bad(f"{shard.uri} is cut off at byte {size_bytes}: the empty block that ends a tar is missing")
    if block.strip(b"\0"):
        raise _bad(f"{shard.uri} is damaged at byte {end}: there is no header of a member")
    behind = file.read(64 << 10)
    if behind.strip(b"\0"):
        raise _bad(f"{shard.uri} ends at byte {end}, but more data follows: separate tars that were concatenated")


def _sample_rows(sample: _Sample, shard: storage.ObjectInfo) -> Iterator[Row]:
    where = f"sample {_shown(sample.key)} of {shard.uri}"
    columns: Any = {}
    extra: dict[str, str] = {}
    try:
        for extension, data in sample.texts.items():
            if data is None:
                raise _bad(f"{where} has a .{extension} of more than {_MOST_TEXT_BYTES >> 20} MiB")
            text = data.decode("utf-8-sig")
            if extension == "json":
                columns = json.loads(text)
            else:
                extra[extension] = text.strip()
    except (ValueError, RecursionError) as error:
        columns = _bad(f"{where}: its .{extension} cannot be read: {error}")
    except Rejected as rejected:
        columns = rejected
    for span in sample.audio:
        stored = _member(shard, span.uri, span.size_bytes)
        yield Row(f"member {_shown(span.name)} of {shard.uri}", span.uri, columns, extra, stored)
    for name in sample.links:
        where = f"member {_shown(name)} of {shard.uri}"
        yield Row(where, _sample_uri(shard, name), _bad(f"{where} is a link; pack the file itself"))
    if not sample.audio and (
        isinstance(columns, Rejected) or (isinstance(columns, Mapping) and _names_audio(columns))
    ):
        yield Row(where, _sample_uri(shard, sample.key), columns, extra)


def _member(shard: storage.ObjectInfo, uri: str, size_bytes: int | None) -> storage.ObjectInfo:
    """Makes the ObjectInfo of a member from its shard; an empty (unknown) canonical name stays empty."""
    canonical = shard.canonical and shard.canonical + uri[len(shard.uri) :]
    return storage.ObjectInfo(uri, size_bytes, identity(shard), shard.mtime, canonical)


def _sample_uri(shard: storage.ObjectInfo, name: str) -> str:
    """Returns a URI that identifies a sample without audio in a dead letter; it cannot be opened."""
    return f"{shard.uri}#sample={quote(name, safe='', errors='surrogateescape')}"


def _shown(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _names_audio(columns: Mapping[str, Any]) -> bool:
    return any(columns.get(name) for name in ("uri", "audio_filepath"))


# --- Parquet and Arrow ---


def _audio_column(schema: Any) -> str | None:
    """Finds the column of a Hugging Face `Audio` feature: a struct with `bytes`, by its metadata or its name."""
    kinds: dict[str, Any] = {}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # written by something else
    found = [field.name for field in schema if _has_bytes(field.type) and kinds.get(field.name, "Audio") == "Audio"]
    return min(found, key=lambda name: (kinds.get(name) != "Audio", name != "audio"), default=None)


def _has_bytes(kind: Any) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    child = kind.field("bytes").type
    return bool(pa.types.is_binary(child) or pa.types.is_large_binary(child) or pa.types.is_null(child))


def _parquet_rows(found: storage.ObjectInfo, *, named: bool) -> Iterator[Row]:
    """Yields the rows of a Parquet file with embedded audio; without audio, the rows of a manifest."""
    number = 0
    is_own = False
    try:
        with storage.open_version(found) as file:
            parquet = ParquetFile(file, buffer_size=1 << 20)
            schema = parquet.schema_arrow
            audio, is_own = _audio_column(schema), is_own_table(schema)
            if audio is not None:
                for batch, has_bytes in _batches(parquet, audio):
                    for row, there in zip(batch.to_pylist(), has_bytes, strict=True):
                        name = (row.pop(audio) or {}).get("path")
                        cell = Cell(found.uri, number, audio, _base(name))
                        # Its size would have to be read with the audio itself.
                        stored = _member(found, cell.uri, None) if there else None
                        number += 1
                        yield _audio_row(number, found.uri, cell.uri, name, row, stored)
    except (pa.ArrowException, OSError) as error:  # a damaged footer is an OSError to pyarrow
        raise _bad(f"{found.uri} cannot be read beyond row {number}: {error}") from error
    if is_own and not named:
        yield from skip_own_file(found.uri)
    elif audio is None:
        yield from manifest_rows(found.uri)


def _batches(parquet: ParquetFile, audio: str) -> Iterator[tuple[Any, list[bool]]]:
    """Yields batches without the audio bytes, and for each row whether it has bytes, mostly known from the footer."""
    paths = [parquet.schema.column(index).path for index in range(len(parquet.schema))]
    leaf = f"{audio}.bytes"
    columns = [field.name for field in parquet.schema_arrow if field.name != audio and not is_binary(field.type)]
    if f"{audio}.path" in paths:
        columns.append(f"{audio}.path")
    for index in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(index)
        stated = group.column(paths.index(leaf)).statistics
        nulls = stated.null_count if stated is not None and stated.has_null_count else None
        all_alike = nulls in (0, group.num_rows) and len(columns) > 0
        wanted = columns if all_alike else [*columns, leaf]
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=wanted):
            if all_alike:
                yield _with_column(batch, audio), [nulls == 0] * len(batch)
                continue
            struct = batch.column(batch.schema.get_field_index(audio))
            there = [value.is_valid for value in struct.field("bytes")]
            valid = struct.is_valid().to_pylist()
            plain = batch.drop_columns([audio]).append_column(audio, _without_bytes(struct))
            yield plain, [here and whole for here, whole in zip(there, valid, strict=True)]


def _with_column(batch: Any, audio: str) -> Any:
    return batch if audio in batch.schema.names else batch.append_column(audio, pa.nulls(len(batch)))


def _without_bytes(struct: Any) -> Any:
    """Returns the structs with their path only."""
    if struct.type.get_field_index("path") < 0:
        return pa.nulls(len(struct))
    return pa.StructArray.from_arrays([struct.field("path")], ["path"], mask=struct.is_null())


def _arrow_rows(found: storage.ObjectInfo) -> Iterator[Row]:
    """Yields the rows of an Arrow stream (`save_to_disk`), in which each row's audio bytes are contiguous."""
    number = 0
    try:
        with storage.open_version(found) as opened, _arrow_file(found.uri, opened) as source:
            for row in _rows_of_stream(source, found):
                number += 1
                yield row
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _bad(f"{found.uri} cannot be read beyond row {number}: {error}") from error


def _arrow_file(uri: str, opened: BinaryIO) -> Any:
    # Of a memory-mapped local file, only the needed parts are read. Otherwise, one batch at a time is in memory.
    return pa.memory_map(uri) if "://" not in uri else pa.PythonFile(opened, mode="r")


def _rows_of_stream(source: Any, found: storage.ObjectInfo) -> Iterator[Row]:
    # Arrow's file format is a stream with eight bytes before it and an index after it.
    source.seek(len(_ARROW_FILE) if source.read(len(_ARROW_FILE)) == _ARROW_FILE else 0)
    schema = pa.ipc.read_schema(pa.ipc.read_message(source))
    audio = _audio_column(schema)
    if audio is None:
        raise _bad(f"{found.uri} has no column with audio in it, but {', '.join(schema.names)}")
    number = 0
    end = source.tell()
    for message in _messages(source):
        end = source.tell()
        batch = pa.ipc.read_record_batch(message, schema)
        struct = batch.column(schema.get_field_index(audio))
        spans = _spans(struct, message, end - message.body.size, found.uri)
        kept = [name for name in schema.names if name != audio and not is_binary(schema.field(name).type)]
        plain = batch.select(kept).append_column(audio, _without_bytes(struct))
        for row, place in zip(plain.to_pylist(), spans, strict=True):
            name = (row.pop(audio) or {}).get("path")
            number += 1
            uri, stored = f"{found.uri}#row={number - 1}", None
            if place is not None:
                uri = Span(found.uri, *place, _base(name)).uri
                stored = _member(found, uri, place[1])
            yield _audio_row(number, found.uri, uri, name, row, stored)
    if source.tell() == end:
        raise _bad(f"{found.uri} is cut off after row {number}: its end marker is missing")


def _messages(source: Any) -> Iterator[Any]:
    while True:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        if message.type != "record batch":
            raise pa.ArrowInvalid(f"it contains a {message.type}; save it again without dictionaries, or as Parquet")
        yield message


def _spans(struct: Any, message: Any, body_offset: int, uri: str) -> list[tuple[int, int] | None]:
    """Returns (offset in the file, size) of each row's audio bytes; None for rows without bytes."""
    values = struct.field("bytes")
    _, offsets, data = values.buffers()
    if data is None or data.size == 0:
        inside = 0
    else:
        inside = data.address - message.body.address
        if not 0 <= inside <= message.body.size - data.size:
            raise _bad(f"{uri} has compressed batches; save it without compression, or as Parquet")
    width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    bounds = np.frombuffer(offsets, width)[values.offset : values.offset + len(values) + 1].tolist()
    there = zip(values.is_valid().to_pylist(), struct.is_valid().to_pylist(), bounds, bounds[1:], strict=False)
    return [(body_offset + inside + a, b - a) if here and whole else None for here, whole, a, b in there]


def _audio_row(
    number: int,
    container: str,
    uri: str,
    name: str | None,
    extra: Mapping[str, Any],
    stored: storage.ObjectInfo | None,
) -> Row:
    where = f"row {number} of {container}"
    if stored is None and not name:
        return Row(where, uri, _bad(f"{where} has no audio and no path of one"))
    return Row(where, uri, {} if stored else {"uri": name}, extra, stored)


def _base(name: str | None) -> str:
    """Returns the last part of a path with slashes or backslashes."""
    return (name or "").replace("\\", "/").rpartition("/")[2]


def _bad(detail: str) -> Rejected:
    return Rejected(Stage.LIST, Reason.UNSUPPORTED_FORMAT, detail)
