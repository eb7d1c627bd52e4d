# The service of a finished run on one machine without a GPU. A test checks this file by hadolint; no image has been built.
#
#     docker build --file containers/service.Dockerfile --tag gream-service .
#     docker run --publish 127.0.0.1:8000:8000 --shm-size 4g --env GREAM_KEYS --stop-timeout 120 \
#         --volume "$PWD/runs/ml-100k:/served:ro" gream-service
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/gream
COPY . .
RUN requirements/install.sh && useradd --uid 1000 --create-home gream
USER 1000
ENV PATH=/opt/gream/.venv/bin:$PATH
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=8)"]
# All interfaces of the container, hence the keys; what --publish names decides who reaches them.
ENTRYPOINT ["gream", "serve", "--run", "/served", "serving.host=0.0.0.0", "serving.key_variable=GREAM_KEYS"]
