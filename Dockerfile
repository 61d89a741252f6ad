# perturbjax on a CPU, or with CUDA:
#   docker build -t perturbjax .
#   docker build -t perturbjax:cuda --build-arg JAX="jax[cuda13]" .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" perturbjax build --load-data load_data.csv --images . --out dataset
FROM python:3.12-slim
ARG JAX="jax"
WORKDIR /opt/perturbjax
COPY pyproject.toml README.md LICENSE ./
COPY perturbjax perturbjax
COPY data_prep data_prep
# The argument selects JAX; pyproject.toml has the compatible versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${JAX}" ".[features]"
WORKDIR /data
# The user may have no writable home directory.
ENV XDG_CACHE_HOME=/data/.cache MPLCONFIGDIR=/tmp/matplotlib
ENTRYPOINT ["perturbjax"]
CMD ["--help"]
