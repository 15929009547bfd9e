"""Signals completion of a stream on runners that do not stop by themselves (Flink)."""

from types import MappingProxyType
from typing import Any

import apache_beam as beam
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow, GlobalWindows

from af3pipe import storage
from af3pipe.transforms.stores import set_storage


class _EndDoFn(beam.DoFn):
    _END = TimerSpec("end", TimeDomain.WATERMARK)

    def __init__(self, uri: str, storage_options: storage.StorageOptions) -> None:
        self._uri = uri
        self._storage_options = storage_options

    def setup(self) -> None:
        set_storage(self._storage_options)

    def process(self, keyed: tuple[str, str], end: Any = beam.DoFn.TimerParam(_END)) -> None:
        end.set(GlobalWindow().max_timestamp())

    @on_timer(_END)
    def on_end(self) -> None:
        storage.write_atomic(self._uri, b"")


class SignalEnd(beam.PTransform):
    """Writes an empty file when the watermark of a PCollection has reached its end, so that no more elements come.

    Args:
        uri: URI of the file.
        storage_options: See `ReadRecordings`.
    """

    def __init__(self, uri: str, *, storage_options: storage.StorageOptions = MappingProxyType({})) -> None:
        super().__init__()
        self._dofn = _EndDoFn(uri, dict(storage_options))

    def expand(self, last: Any) -> Any:
        pair: Any = tuple[str, str]
        key = last.pipeline | "Key" >> beam.Create([("", "")], reshuffle=False).with_output_types(pair)
        none = last | "None" >> beam.FlatMap(lambda _: []).with_output_types(pair)
        return (
            (key, none | "Ever" >> beam.WindowInto(GlobalWindows()))
            | "KeyAndNone" >> beam.Flatten()
            | "End" >> beam.ParDo(self._dofn)
        )
