# SPDX-License-Identifier: Apache-2.0
"""Runs the core library's GPU tests and the step benchmark on a bare machine with torch and a GPU, without a network.

    python gpu-pack/benchmarks/gpu/run.py --output results

It needs a folder that `pack.py` has made and torch, and imports nothing else. It makes an environment beside the results,
with the machine's own packages and the wheels that are missing, and says what it skips.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import site
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["main"]

PACK = Path(__file__).resolve().parents[2]
_SMALL = {"layers": 2, "hidden": 256, "ffn": 512, "heads": 4, "sequence": 128, "vocab": 512, "repeats": 3}
_NOT_HERE = (
    "several GPUs: tensor, pipeline and data parallelism over NCCL are not tested; the CPU tests cover them over gloo",
    "NeMo: its loop, its files and its commands are not run",
)


def main() -> int:
    """The command line; `--help` describes it. Returns 0 if no test failed and the benchmark ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results and the environment")
    parser.add_argument("--cpu", action="store_true", help="rehearse on a CPU: the same tests and a small benchmark")
    options = parser.parse_args()
    if not (PACK / "wheels").is_dir():
        parser.error(f"{PACK} has no folder wheels; make it with benchmarks/gpu/pack.py")
    if importlib.util.find_spec("torch") is None:
        parser.error(f"{sys.executable} has no torch; run this with a Python that has it")
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve()
    python, kept = _environment(output / "env")
    device = _say_devices(python)
    skipped = list(_NOT_HERE)
    if device is None and not options.cpu:
        print("refused: torch sees no GPU here; --cpu rehearses on the CPU", file=sys.stderr)
        return 2
    tests = _tests(python, output, cpu=options.cpu)
    skipped += [f"{count} tests: {reason}" for reason, count in tests["skipped"].items()]
    measured = _benchmark(python, output, cpu=options.cpu)
    report = {"device": device, "kept": kept, "tests": tests, "benchmark": measured, "not run": skipped}
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\nnot run here:", *(f"- {line}" for line in skipped), sep="\n")
    print(f"\n{tests['passed']} tests passed, {tests['failed']} failed; {output / 'report.json'}")
    return 0 if tests["failed"] == 0 and tests["passed"] and measured is not None else 1


def _environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """Makes the environment. Returns its Python, and the packages of the machine that are kept, with their versions."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = next(folder.glob("lib/python*/site-packages"))
        # A virtual environment in which this runs has torch, and system_site_packages would not see it.
        (own / "machine.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    there = {_name(one.metadata["Name"]): one.version for one in importlib.metadata.distributions()}
    wheels = {_name(path.name.split("-")[0]): path for path in sorted((PACK / "wheels").glob("*.whl"))}
    missing = [str(path) for name, path in wheels.items() if name not in there or name == "nemo-tied-lora"]
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
    subprocess.run([*install, *missing], check=True)
    return python, {name: there[name] for name in wheels if name in there}


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _say_devices(python: Path) -> str | None:
    """Prints torch's version and the GPU's name; returns the name."""
    program = (
        "import torch; print(torch.__version__); print(torch.cuda.is_available() and torch.cuda.get_device_name())"
    )
    version, name = subprocess.run(
        [str(python), "-c", program], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-2:]
    print(f"torch {version}, GPU: {name if name != 'False' else 'none'}", flush=True)
    return None if name == "False" else name


def _tests(python: Path, output: Path, *, cpu: bool) -> dict[str, Any]:
    """Runs the tests that are marked `gpu`; on a CPU those of tests/gpu."""
    results = output / "tests.xml"
    chosen = ["tests/gpu"] if cpu else ["-m", "gpu", "tests"]
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}", *chosen]
    subprocess.run(command, cwd=PACK, env={**os.environ, "PYTHONPATH": str(PACK)}, check=False)
    cases = list(ElementTree.parse(results).getroot().iter("testcase")) if results.exists() else []
    outcomes = Counter(_outcome(case) for case in cases)
    reasons = Counter(str(skip.get("message")) for case in cases if (skip := case.find("skipped")) is not None)
    return {
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": dict(reasons),
        "names": [f"{case.get('classname')}::{case.get('name')}" for case in cases if _outcome(case) == "failed"],
    }


def _outcome(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    return "failed" if case.find("failure") is not None or case.find("error") is not None else "passed"


def _benchmark(python: Path, output: Path, *, cpu: bool) -> dict[str, Any] | None:
    """Runs the step benchmark. Returns its JSON, or None if it failed."""
    results = output / "step.json"
    results.unlink(missing_ok=True)
    command = [str(python), str(PACK / "benchmarks" / "gpu" / "step.py"), "--output", str(results)]
    if cpu:
        command += ["--device", "cpu", *(word for name, size in _SMALL.items() for word in (f"--{name}", str(size)))]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(PACK)}, check=False)
    return json.loads(results.read_text()) if results.exists() else None


if __name__ == "__main__":
    sys.exit(main())
