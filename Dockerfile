# The one image that every step of the pipeline runs in. `make image` builds it, docs/image.md says what is in it, and
# how it is run: as any user but root, with a read-only root file system, and one place to write to, /tmp.
#
# What pip needs in order to reach its packages (an index of your own, a certificate) is a secret of the build, pip.conf,
# and in no layer of the image.

# A Debian with Python 3.11 to 3.13 and its venv module.
ARG BASE=python:3.11-slim-bookworm

# What pyproject.toml asks for: as long as that stays the same, so do the layers below, whatever else is in the file.
FROM ${BASE} AS wanted
COPY pyproject.toml image/requirements.py /
RUN python3 requirements.py > requirements.txt

FROM ${BASE} AS build
ENV PATH=/opt/moeprune/bin:${PATH} \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv /opt/moeprune
COPY constraints.txt ./

# PyTorch for processors: cpu. For NVIDIA's GPUs, with the libraries that it needs: cu130, or another CUDA that its index
# knows. An empty TORCH_INDEX leaves it to pip.conf where such wheels are.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    pip install --no-compile --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}/${TORCH}"} torch \
    && python3 -c "import torch; got = 'cu' + torch.version.cuda.replace('.', '') if torch.version.cuda else 'cpu'; \
                   assert got == '${TORCH}', f'asked for PyTorch for ${TORCH}, got {got}; see TORCH_INDEX'"
COPY --from=wanted requirements.txt ./
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    pip install --no-compile --constraint constraints.txt --requirement requirements.txt

# What changes with every commit is a layer of its own, of a few megabytes.
FROM build AS moeprune
COPY . .
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    pip install --no-deps --compile --root /own --prefix /opt/moeprune .

FROM build AS trimmed
COPY image/trim.py .
# Compiled here, as nothing can be where it runs. A file that this Python cannot read is meant for a later one.
RUN pip check && python3 trim.py /opt/moeprune && { python3 -m compileall -qq /opt/moeprune/lib || true; }

FROM ${BASE}
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3.*/site-packages/* /usr/lib/python3/dist-packages/pip* \
        /usr/local/lib/python3.*/ensurepip /usr/lib/python3.*/ensurepip /usr/share/python-wheels \
    && useradd --uid 1000 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin moeprune
COPY --from=trimmed /opt/moeprune /opt/moeprune
COPY --from=moeprune /own /
# A user whom the image does not know, as OpenShift makes up, has a name all the same.
ENV PATH=/opt/moeprune/bin:${PATH} \
    HOME=/tmp \
    USER=moeprune \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
    GIT_PYTHON_REFRESH=quiet \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /tmp
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
ARG TORCH=cpu
ARG BASE
LABEL org.opencontainers.image.title="moeprune" \
      org.opencontainers.image.description="Make a Mixture-of-Experts LLM smaller for a domain, and prove what it kept" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}" \
      moeprune.torch="${TORCH}"
CMD ["moeprune", "--help"]
