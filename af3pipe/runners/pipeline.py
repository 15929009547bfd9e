"""Creates Beam pipelines that leave no temporary folder behind."""

import shutil
import weakref

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions


def new_pipeline(options: PipelineOptions) -> beam.Pipeline:
    """Creates a pipeline whose temporary folder is removed with it, or when the process ends.

    Beam removes that folder only when the pipeline has run to its end.
    """
    pipeline = beam.Pipeline(options=options)
    weakref.finalize(pipeline, shutil.rmtree, pipeline.local_tempdir, ignore_errors=True)
    return pipeline
