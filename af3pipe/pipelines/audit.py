"""Audits an output, and compares it with a fresh listing of its inputs."""

from collections.abc import Sequence

from af3pipe.pipelines.relist import InputError, relist
from af3pipe.schemas import MIX
from af3pipe.tables import audit as tables
from af3pipe.tables.audit import Audit, AuditError, Compared
from af3pipe.tables.latest import Latest
from af3pipe.tables.run_records import Runs


def audit(output: str, inputs: Sequence[str] = ()) -> Audit:
    """Audits an output (`tables.audit`), and compares it with a fresh listing of `inputs`.

    Args:
        output: Folder of the tables.
        inputs: Inputs as of a run. Recordings without a row, and recordings that have changed, are problems.

    Raises:
        AuditError: The folder has no output of a run, or an input cannot be listed.
        Rejected: The store cannot be read.
    """

    def compare(view: Latest, runs: Runs) -> Compared:
        """Lists the inputs with the channel and stream of the newest run, and compares them with the latest view."""
        last = max(runs.records, default="")
        job = runs.records.get(last, {}).get("job") or {}
        try:
            return relist(
                view,
                inputs,
                channel=job.get("channel", MIX),
                stream=job.get("stream"),
                allow_prefixes=job.get("allow_prefixes", ()),
                exclude=[output],
            )
        except InputError as error:
            raise AuditError(str(error)) from error

    return tables.audit(output, compare if inputs else None)
