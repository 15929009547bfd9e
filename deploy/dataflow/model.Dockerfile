# A worker image with a model in it, at /models/NAME. The context is the model's folder:
#   docker build -f deploy/dataflow/model.Dockerfile --build-arg WORKER_IMAGE="$WORKER_IMAGE" \
#       --build-arg NAME=audio-flamingo-3-hf -t "$WORKER_IMAGE-af3" /data/audio-flamingo-3-hf
# Whoever pushes it distributes the weights. NVIDIA's are for non-commercial use: see README.md here.

ARG WORKER_IMAGE
FROM ${WORKER_IMAGE}
ARG NAME=model
COPY . /models/${NAME}/
# What is here is all there is: a wrong name fails at once, and no worker waits for the hub.
ENV HF_HUB_OFFLINE=1
