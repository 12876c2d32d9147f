"""What pyproject.toml cannot say: where a wheel has `configs`, `input_pipeline` and the models that come along.

They go into truepose_jax/bundled/, so that no bare top-level name of ours is in anybody's way; importing truepose_jax puts that
folder last on Python's path. An editable installation leaves the clone as it is.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

MOVED = ("configs", "input_pipeline")
MODELS = "docs/models"


class BuildBundled(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built = pathlib.Path(self.build_lib)
        bundled = built / "truepose_jax" / "bundled"
        for package in MOVED:
            shutil.rmtree(bundled / package, ignore_errors=True)
            shutil.move(built / package, bundled / package)
        shutil.copytree(MODELS, bundled / MODELS, ignore=shutil.ignore_patterns("*.png"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildBundled})
