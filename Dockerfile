# What every task of a compiled Kubeflow pipeline runs in (docs/kubeflow.md).
#
#   docker build -t amenable:0.1.0 .                                   # CPU
#   docker build -t amenable:0.1.0 --build-arg TORCH_INDEX=https://pypi.org/simple .   # CUDA
#   # every stage, in seconds:
#   docker run --rm -w /src amenable:0.1.0 amenable run examples/tiny.toml --out /tmp/tiny

FROM python:3.11-slim

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG KFP=kfp[kubernetes]==2.17.3

RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
COPY examples examples
# kfp pins other versions of these four than the tests of Amenable run with.
RUN grep -vE '^(certifi|protobuf|requests|urllib3)==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir ".[kfp]" "$KFP" -c /tmp/constraints.txt \
    && useradd --create-home --uid 1000 amenable \
    && install -d -o amenable /runs

# Models that are pulled lie with the runs, on the volume that is mounted here (kfp.mount).
ENV AMENABLE_HOME=/runs/.amenable
USER amenable
WORKDIR /runs
