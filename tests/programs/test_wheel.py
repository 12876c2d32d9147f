"""The wheel: built, installed into an empty folder, used from another empty one, with nothing of the clone in reach."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from input_pipeline.schema import NUM_JOINTS
from tests.process import LONGEST, ROOT, environment, of_code
from truepose_jax import __version__
from truepose_jax.__main__ import COMMANDS, main

PACKED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "truepose_jax",
    "input_pipeline",
    "configs",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKED, "docs/models"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", f"--wheel-dir={out}", source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--no-index", f"--target={folder}", wheel)
    return folder


def _pip(*words) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def truepose(site: pathlib.Path, folder: pathlib.Path, *words) -> tuple[int, str, str]:
    """The installed script, in a folder that it finds nothing in."""
    command = [sys.executable, site / "bin" / "truepose", *map(str, words)]
    env = environment(cached=True, PYTHONPATH=str(site))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LONGEST)
    return done.returncode, done.stdout, done.stderr


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"truepose_jax", f"truepose_jax-{__version__}.dist-info"}
    wanted = {
        "truepose_jax/py.typed",
        "truepose_jax/interop/torch_truepose.py",
        "truepose_jax/models/patch_codec.safetensors",
        "truepose_jax/detection/weights/pose_landmark_full.tflite",
        "truepose_jax/detection/weights/NOTICE",
        "truepose_jax/bundled/configs/demo.py",
        "truepose_jax/bundled/docs/models/synthetic_128x96/truepose.safetensors",
    }
    assert wanted <= set(names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "input_pipeline").rglob("*.py")}
    assert {f"truepose_jax/bundled/{module}" for module in modules} <= set(names)


def test_a_picture_from_an_empty_folder(site, tmp_path):
    grid = np.mgrid[:160, :120].sum(0)
    Image.fromarray(np.stack([grid % 256, grid * 2 % 256, grid * 3 % 256], -1).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    joints = np.stack([np.linspace(40, 80, NUM_JOINTS), np.linspace(20, 140, NUM_JOINTS)], -1)
    np.savetxt(tmp_path / "pose.txt", joints)
    code, out, errors = truepose(
        site, tmp_path, "generate", "--workdir=synthetic_128x96", "--source=a.png", "--parsing=none", "--pose=pose.txt",
        "--pose-frame=160x120", "--source-pose=pose.txt", "--source-pose-frame=160x120", "--out=b.png", "--steps=1",
    )  # fmt: skip
    assert code == 0, errors
    assert str(site / "truepose_jax" / "bundled") in out, "the installed model, not the clone's"
    picture = np.asarray(Image.open(tmp_path / "b.png"))
    assert picture.shape == (128, 96, 3) and picture.std() > 10


def test_a_config_by_name_beside_a_folder_of_the_same_name(site, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('somebody else')")
    command = [sys.executable, "-m", "truepose_jax", "train", "--config=demo", "--config.seed=-1", "--workdir=run"]
    env = environment(PYTHONPATH=str(site))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LONGEST)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "config.seed is -1" in done.stderr
    assert os.listdir(tmp_path) == ["configs"]


def test_env_says_what_there_is(site, tmp_path):
    code, out, errors = truepose(site, tmp_path, "env")
    assert code == 0, errors
    facts = dict(line.split(":", 1) for line in out.splitlines())
    assert str(site) in facts["truepose-jax"] and "cpu" in facts["device 0"]
    assert facts["jax"].strip()[0].isdigit() and "GiB" in facts["free here"] and "synthetic_128x96" in facts["models"]
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR", "not kept") in facts["compiled programs"]


@pytest.mark.parametrize("names", [[name for name in COMMANDS if name != "scaling"], ["scaling"]])  # both have --config
def test_help_takes_no_library_that_takes_seconds(names):
    code = """
        import sys
        from truepose_jax.__main__ import main
        for name in sys.argv[1:]:
            try:
                main([name, "--help"])
            except SystemExit as ended:
                assert not ended.code, name
            print("END", sorted({"jax", "flax", "optax", "orbax", "torch", "tensorflow"} & set(sys.modules)))
    """
    code, out, errors = of_code(code, *names).finish()
    assert code == 0, errors
    *pages, rest = out.split("END []\n")
    assert (len(pages), rest) == (len(names), "")
    for name, page in zip(names, pages, strict=True):
        grouped = len(re.findall(r":\n  -", page)) >= 2
        assert grouped or name in ("env", "prepare", "convert", "study"), (
            f"{name}: flags come in groups"
        )  # sub-commands


def test_one_name_for_all_programs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"  {name}" in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["generat"])
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
