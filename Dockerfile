# Images for a CPU and for NVIDIA GPUs:
#   docker build --target cpu --build-arg TORCH_CPU_INDEX=URL -t picogpt:cpu .    URL: the index of PyTorch's CPU wheels
#   docker build --target cuda -t picogpt:cuda .
#   docker run --rm --gpus all --user "$(id -u)" -v "$PWD:/home/picogpt/runs" picogpt:cuda picogpt hardware
# constraints.txt has the version of every package, and in its first line that of Python.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS base
# torch.compile needs a C++ compiler. Debian's stable release has one version of it, which its security updates replace.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home picogpt \
    && install --directory --mode=777 /home/picogpt /home/picogpt/runs
WORKDIR /opt/picogpt
COPY constraints.txt ./
# HOME and USER hold for a --user without an entry in /etc/passwd too.
ENV HOME=/home/picogpt USER=picogpt PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

FROM base AS cpu
ARG TORCH_CPU_INDEX
RUN : "${TORCH_CPU_INDEX:?give --build-arg TORCH_CPU_INDEX=URL, the index of the CPU wheels that pytorch.org names}" \
    && pip install --constraint constraints.txt --no-deps --index-url "$TORCH_CPU_INDEX" torch
COPY . .
RUN pip install --constraint constraints.txt '.[workflow]'
USER 1000
WORKDIR /home/picogpt/runs
CMD ["picogpt", "--help"]

FROM base AS cuda
RUN pip install --constraint constraints.txt torch
COPY . .
RUN pip install --constraint constraints.txt '.[workflow]'
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/picogpt/runs
CMD ["picogpt", "--help"]
