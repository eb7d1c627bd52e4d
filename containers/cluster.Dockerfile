# The image of ray_cluster.yaml's and rayjob.yaml's nodes, with GPUs: this project in /opt/gream, `gream`, `ray` and `serve`
# on PATH, wget for KubeRay's probes. A test checks this file by hadolint; no image has been built.
#
#     docker build --file containers/cluster.Dockerfile --tag gream:0.1.0 .
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/gream
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[gpu]" && useradd --uid 1000 --create-home ray
USER 1000
