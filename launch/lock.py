"""Writes launch/lock/*.txt anew, the image's packages at their newest versions, each with the hash of the one file that is
installed (Linux on x86-64, the Dockerfile's Python); what has no wheel is built from its source.

    pip install uv pip-audit && python launch/lock.py
    for lock in launch/lock/*.txt; do pip-audit --disable-pip --require-hashes --strict -r "$lock"; done
"""

import pathlib
import subprocess
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ("--python-version=3.12", "--python-platform=x86_64-manylinux_2_31", "--format=pylock.toml", "--upgrade")
ALWAYS = ("pose", "web")
ACCELERATORS = ("none", "gpu", "tpu")
OLDER = ["backports.strenum<1.3"]  # 1.3 is for Python below 3.11, which uv does not look at


def locked(accelerator: str) -> str:
    """One line for each package. With those that build the package: in the image nothing is built by others."""
    project = ROOT / "pyproject.toml"
    extras = [f"--extra={name}" for name in (*ALWAYS, accelerator) if name != "none"]
    more = "\n".join([*tomllib.loads(project.read_text())["build-system"]["requires"], *OLDER])
    command = ["uv", "pip", "compile", "--quiet", *TARGET, *extras, str(project), "-"]
    done = subprocess.run(command, input=more, stdout=subprocess.PIPE, text=True, check=True)
    lines = []
    for package in tomllib.loads(done.stdout)["packages"]:
        files = package.get("wheels") or [package["sdist"]]
        hashes = " ".join(f"--hash=sha256:{file['hashes']['sha256']}" for file in files)
        lines.append(f"{package['name']}=={package['version']} {hashes}\n")
    return "".join(lines)


for accelerator in ACCELERATORS:
    (ROOT / "launch" / "lock" / f"{accelerator}.txt").write_text(locked(accelerator))
