# What runs on Dataflow's workers: Beam's worker, af3pipe, torch with CUDA. From the root of a clone:
#   docker build -f deploy/dataflow/worker.Dockerfile -t "$WORKER_IMAGE" .

# Beam and Python are the launcher's, to the last digit of Beam's version and the second of Python's.
ARG BEAM_VERSION=2.77.0
ARG PYTHON_VERSION=3.12
# Its Ubuntu has that Python. All of CUDA that torch needs comes with torch; this has what finds the driver.
ARG CUDA_IMAGE=nvidia/cuda:12.6.3-base-ubuntu24.04

FROM apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION} AS beam

FROM ${CUDA_IMAGE}
ARG BEAM_VERSION
ARG PYTHON_VERSION
# CUDA 12 runs on every driver from 525 on, whichever Dataflow installs; torch from PyPI wants CUDA 13 and driver 580.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG TORCH=torch
# More of af3pipe's extras, with commas between: s3, adapter, quantize.
ARG EXTRAS=dataflow

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Not pinned: Ubuntu removes a version when it has the next one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates "python${PYTHON_VERSION}-venv" \
    && rm -rf /var/lib/apt/lists/* \
    && "python${PYTHON_VERSION}" -m venv /opt/venv

# Ubuntu's own Python takes no packages. Beam's boot program would make an environment that does not see this one.
ENV PATH=/opt/venv/bin:${PATH} \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Before the code, so that a change of it does not move these gigabytes. TORCH may pin it: torch==2.14.1
# hadolint ignore=DL3013
RUN pip install --index-url "${TORCH_INDEX}" "${TORCH}"

COPY pyproject.toml setup.py README.md LICENSE NOTICE /src/
COPY af3pipe /src/af3pipe
RUN pip install "/src[${EXTRAS}]" "apache-beam[gcp]==${BEAM_VERSION}" \
    && pip check \
    && python -c "import af3pipe.models.transformers_engine, torch; print(torch.__version__, torch.version.cuda)"

COPY --from=beam /opt/apache/beam /opt/apache/beam

ENTRYPOINT ["/opt/apache/beam/boot"]
