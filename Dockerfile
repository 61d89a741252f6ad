# perturbjax on a CPU, or with CUDA:
#   docker build -t perturbjax .
#   docker build -t perturbjax:cuda --build-arg JAX="jax[cuda13]" .
#   docker run --rm -v "$PWD:/data" perturbjax build --load-data load_data.csv --images . --out dataset
FROM python:3.12-slim
ARG JAX="jax"
WORKDIR /opt/perturbjax
COPY pyproject.toml README.md LICENSE ./
COPY perturbjax perturbjax
COPY data_prep data_prep
RUN pip install --no-cache-dir "${JAX}" ".[features]"
WORKDIR /data
ENV XDG_CACHE_HOME=/data/.cache
ENTRYPOINT ["perturbjax"]
CMD ["--help"]
