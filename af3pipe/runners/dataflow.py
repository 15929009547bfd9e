"""Google Cloud Dataflow: checks that a job has what it needs there."""

import importlib
import logging
from typing import ClassVar

from apache_beam.options.pipeline_options import GoogleCloudOptions, TestDataflowOptions, WorkerOptions
from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

from af3pipe.runners.parser import option_names
from af3pipe.runners.runner import Runner, RunnerError

_READ_BY_ALL = {
    "job_name",
    "default_sdk_harness_log_level",
    "sdk_harness_log_level_overrides",
    "max_cache_memory_usage_mb",
    "element_processing_timeout_minutes",
}
_log = logging.getLogger(__name__)


class Dataflow(Runner):
    """Submits to Dataflow, whose workers are Google's."""

    flags: ClassVar = (
        option_names(GoogleCloudOptions, TestDataflowOptions, WorkerOptions) | {"dry_run", "dataflow_job_file"}
    ) - _READ_BY_ALL

    def check(self) -> None:
        google = self.options.view_as(GoogleCloudOptions)
        needed = {
            "--project PROJECT": google.project,
            "--temp-location gs://BUCKET/FOLDER": google.temp_location,
            "--region REGION": google.region or DataflowRunner().get_default_gcp_region(),
        }
        missing = [flag for flag, value in needed.items() if not value]
        if missing:
            raise RunnerError(
                f"the Dataflow runner needs {' and '.join(missing)}; as keys of a job file they stand below `beam`"
            )
        if not google.temp_location.startswith("gs://"):
            raise RunnerError(
                f"temp_location is {google.temp_location!r}; Dataflow needs a folder on Google Cloud Storage, gs://..."
            )
        try:
            importlib.import_module("apache_beam.runners.dataflow.internal.apiclient")  # an optional part of Beam
        except ImportError as error:
            raise RunnerError(
                f"the Dataflow runner needs {error.name or error}: pip install 'apache-beam[gcp]'"
            ) from error

    def cancel_job(self) -> None:
        _log.warning(
            "the job goes on at Dataflow: cancel it there (`gcloud dataflow jobs cancel`, or the console), or let it "
            "end"
        )
