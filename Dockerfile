# SPDX-License-Identifier: Apache-2.0
#   docker build --tag nemo-tied-lora .
#   docker run --rm --gpus all --ipc host --volume "$PWD:/workspace/tied-lora" nemo-tied-lora finetune ...
# Files of the mounted folder belong to whoever owns it outside: add --user "$(id -u):$(id -g)" to write there.
# Needs BuildKit, Docker's default builder since 23.0, for the scripts in between.

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
COPY constraints.txt /tmp/tied-lora/

# The wheel, and of what it asks for only what is missing, each without its dependencies: resolving them would let pip
# replace NVIDIA's builds by those of the package index. The last lines prove that nothing was replaced.
RUN python - <<'SCRIPT'
import glob, importlib, importlib.metadata as metadata, os, subprocess, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

THE_CONTAINERS_OWN = ("torch", "nemo-toolkit", "megatron-core", "transformer-engine", "apex")

def installed():
    importlib.invalidate_caches()
    found = ((one.metadata["Name"], one.version) for one in metadata.distributions())
    return {canonicalize_name(name): version for name, version in found if name}

def missing(name, extras, seen):
    """The requirements that are not there, those of what is there included."""
    for one in map(Requirement, metadata.requires(name) or ()):
        key = canonicalize_name(one.name)
        if key in seen or (one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras)):
            continue
        seen.add(key)
        if key not in installed():
            yield key
        elif key not in THE_CONTAINERS_OWN:
            yield from missing(key, one.extras or {""}, seen)

def install(*what):
    # NVIDIA's own constraints name versions of packages that are not there; ours were tested.
    environment = {**os.environ, "PIP_CONSTRAINT": ""}
    command = (sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-deps", *what)
    subprocess.run(command, env=environment, check=True)

before = installed()
absent = [name for name in THE_CONTAINERS_OWN if name not in before]
if absent:
    sys.exit(f"BASE has no {', '.join(absent)}: use NVIDIA's NeMo container, such as nvcr.io/nvidia/nemo:25.07")
install(*glob.glob("/tmp/tied-lora/*.whl"))
while names := sorted(missing("nemo_tied_lora", {"", "quickstart"}, set())):
    install("--constraint", "/tmp/tied-lora/constraints.txt", *names)
after = installed()
changed = [f"{name} {version} -> {after.get(name)}" for name, version in before.items() if after.get(name) != version]
if changed:
    sys.exit(f"the installation changed what the container brought: {', '.join(changed)}")
print("unchanged:", *(f"{name} {after[name]}" for name in THE_CONTAINERS_OWN))
print("added:", *(f"{name} {version}" for name, version in sorted(after.items()) if name not in before))
SCRIPT

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
