# What a Flex Template starts to submit a job: af3pipe and Beam, without torch. From the root of a clone:
#   docker build -f deploy/dataflow/launcher.Dockerfile -t "$LAUNCHER_IMAGE" .

ARG PYTHON_TAG=312
ARG LAUNCHER_TAG=latest
FROM gcr.io/dataflow-templates-base/python${PYTHON_TAG}-template-launcher-base:${LAUNCHER_TAG}
ARG BEAM_VERSION=2.77.0

ENV PIP_NO_CACHE_DIR=1
COPY pyproject.toml setup.py README.md LICENSE NOTICE /src/
COPY deploy/dataflow/launcher_requirements.py /src/
COPY af3pipe /src/af3pipe
# The package without its dependencies, then all of them but torch and what is of use to torch alone.
RUN python /src/launcher_requirements.py /src/pyproject.toml > /src/requirements.txt \
    && pip install -r /src/requirements.txt "apache-beam[gcp]==${BEAM_VERSION}" \
    && pip install --no-deps /src \
    && python -c "import af3pipe.pipelines.submit"

COPY deploy/dataflow/main.py /template/main.py
# No FLEX_TEMPLATE_PYTHON_SETUP_FILE: workers have the package in their image.
ENV FLEX_TEMPLATE_PYTHON_PY_FILE=/template/main.py
