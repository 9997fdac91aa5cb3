# SPDX-License-Identifier: Apache-2.0
#   docker build --tag nemo-tied-lora .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/workspace/tied-lora" nemo-tied-lora finetune ...
# Files of the mounted folder belong to whoever owns it outside: add --user "$(id -u):$(id -g)" to write there.

ARG BASE=nvcr.io/nvidia/nemo:25.07

# The container's own pip and setuptools make the wheel, so the build asks the network for nothing.
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY nemo_tied_lora nemo_tied_lora
COPY configs configs
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE}
COPY --from=build /wheels /tmp/tied-lora/
COPY constraints.txt launch/container/install.py /tmp/tied-lora/
RUN python /tmp/tied-lora/install.py /tmp/tied-lora

# NeMo compiles its dataset code into its own folder at first use, where the user below may not write.
RUN make --directory "$(python -c 'import importlib.util as u; print(u.find_spec("nemo").submodule_search_locations[0])')/collections/nlp/data/language_modeling/megatron"

# Not 1000: Ubuntu's images have a user of that number. HOME is everybody's, because `docker run --user` and Slurm's
# containers bring a user of their own, and torch, Triton and NeMo write their caches there.
ARG UID=10001
RUN useradd --uid "${UID}" --no-log-init --create-home --home-dir /home/tied-lora tied-lora \
    && install --directory --owner tied-lora --mode 1777 /workspace/tied-lora \
    && chmod 1777 /home/tied-lora
# Nothing is asked of the network at run time: a name of the Hugging Face hub where a file belongs fails at once.
ENV HOME=/home/tied-lora HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
USER ${UID}
WORKDIR /workspace/tied-lora
ENTRYPOINT ["tied-lora"]
CMD ["--help"]
