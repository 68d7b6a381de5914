# maesil in a container.
#   CPU:  docker build -t maesil .
#   GPU:  docker build -t maesil:gpu --build-arg EXTRA=[gpu] .
# For PyTorch's CPU build, name the package index that holds it: --build-arg TORCH_INDEX=URL.
#   docker run --rm -v /data:/data -v maesil-config:/home/maesil/.config maesil ingest /data/ct --out /data/store.zarr
# The image was never built: no Docker daemon was at hand. `pip install` of this tree was checked outside of a container.
# The volume maesil-config keeps the identity key: with another key the same scans get other ids.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRA=
COPY . /src
# One call, so that torch has a version that maesil allows. Of equal versions pip takes `+cpu`.
RUN python -m venv /opt/maesil \
 && /opt/maesil/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} "/src${EXTRA}"

FROM python:${PYTHON}-slim
ARG EXTRA=
# Triton compiles the code that launches its kernels.
RUN if [ -n "${EXTRA}" ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*; fi
COPY --from=build /opt/maesil /opt/maesil
RUN useradd --create-home maesil && mkdir -p /home/maesil/.config && chown maesil /home/maesil/.config
USER maesil
WORKDIR /home/maesil
ENV PATH=/opt/maesil/bin:$PATH
ENTRYPOINT ["maesil"]
CMD ["--help"]
