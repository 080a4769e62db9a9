# The one image that every component of the pipeline runs in.
#
#   docker build -t moeprune:0.1.0 .
#
# pip's index decides between CUDA and CPU wheels of torch: --build-arg PIP_EXTRA_INDEX_URL=... for another one.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python3 -m venv /opt/moeprune
COPY constraints.txt pyproject.toml README.md ./
COPY components components
COPY pipelines pipelines
COPY src src
RUN /opt/moeprune/bin/pip install --no-cache-dir -c constraints.txt '.[tracking,pipelines,cluster]'

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="moeprune" \
      org.opencontainers.image.description="Prune a Mixture-of-Experts LLM for a domain"
COPY --from=build /opt/moeprune /opt/moeprune
# KFP's launcher calls `python3`; caches go where any user may write.
ENV PATH=/opt/moeprune/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    MLFLOW_DISABLE_TELEMETRY=true
RUN useradd --uid 1000 --create-home moeprune
USER 1000
WORKDIR /home/moeprune
ENTRYPOINT []
CMD ["moeprune", "--help"]
