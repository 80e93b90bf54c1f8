# The embedded engine on a CPU, with the demo model:
#   docker build -f deploy/cpu.Dockerfile -t fd_dsa:cpu .
#   docker run --rm -p 127.0.0.1:8000:8000 fd_dsa:cpu
#   docker run --rm -p 127.0.0.1:8000:8000 -v /models:/models:ro fd_dsa:cpu /models/my-model
FROM debian:bookworm-slim

# Debian's own Python 3.11; libgomp1 for Paddle
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libgomp1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fd_dsa fd_dsa
RUN python3 -m venv /opt/fd_dsa \
    && /opt/fd_dsa/bin/pip install --no-cache-dir '.[cpu,structured]' \
    && rm -rf /src/*

RUN useradd --system --create-home --uid 10001 fd_dsa
USER 10001
WORKDIR /home/fd_dsa
ENV PATH=/opt/fd_dsa/bin:$PATH

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/livez')"]
ENTRYPOINT ["fd-dsa", "serve", "--host", "0.0.0.0"]
