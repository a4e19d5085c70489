# The image that scheduler, workers and runner of a job use on Kubernetes (and behind Dask Gateway).
#
#   docker build -t registry.example.com/team/cortex-dask:1 .
#
# Its Python, dask and distributed have to be those of whoever submits; this takes the versions that are installed here:
#
#   docker build --build-arg PYTHON_VERSION=3.12 --build-arg "REQUIREMENTS=$(pip freeze | grep -E '^(dask|distributed)==')" .
#
# What handlers need as well, once for all of them (a project may also bring a requirements.txt of its own):
#
#   docker build --build-arg 'REQUIREMENTS=scikit-learn==1.7.* xgboost' .
#
# GPUs: the driver is the node's, and most wheels (torch, onnxruntime-gpu, tensorflow[and-cuda]) bring their CUDA
# libraries along, so this image with them in REQUIREMENTS is enough. Where a CUDA installation is needed, build on one;
# Debian's or Ubuntu's own Python is then used:
#
#   docker build --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04 .

ARG PYTHON_VERSION=3.12
ARG BASE_IMAGE=python:${PYTHON_VERSION}-slim

FROM ${BASE_IMAGE} AS base
# tini: Dask is the first process of a pod and does not collect what killed handlers leave behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates tini \
    && if ! python3 -c 'import ensurepip' 2>/dev/null; then apt-get install --yes --no-install-recommends python3 python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/cortex-dask
ENV PATH=/opt/cortex-dask/bin:$PATH

FROM base AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY cortex_dask /src/cortex_dask
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM base
ARG EXTRAS=kubernetes,gateway
ARG REQUIREMENTS=
COPY --from=wheel /wheel /wheel
# Nobody can write bytecode there later, and each handler process would compile its imports again.
RUN pip install --no-cache-dir "$(echo /wheel/cortex_dask-*.whl)[${EXTRAS}]" ${REQUIREMENTS} \
    && python -m pip check \
    && { python -m compileall -q -j 0 /opt/cortex-dask/lib >/dev/null || true; } \
    && rm -rf /wheel

# A number, so that runAsNonRoot can be checked. Projects, models and interpreters are cached in the home directory.
RUN useradd --uid 10001 --user-group --create-home cortex
USER 10001:10001
WORKDIR /home/cortex
ENV HOME=/home/cortex \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

ENTRYPOINT ["tini", "--"]
CMD ["cortex-dask", "--help"]
