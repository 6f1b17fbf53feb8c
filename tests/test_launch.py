"""The launch scripts: their words are known to who reads them, and they do the right thing after each exit code.

There is no cloud here: a `gcloud` of the tests answers in the order of a plan and runs the remote commands on this
machine, in a home directory of its own, with a trainer that only notes its arguments.
"""

import getpass
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import REPOSITORY

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOBSETS = sorted(LAUNCH.glob("jobset-*.yaml"))
SHELLCHECK = shutil.which(
    "shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
)
GCLOUD = shutil.which("gcloud")
ODD = ["--config=configs/ffhq128.py", "--workdir=/mnt/my runs/it's", '--config.data.name="a b"', "$HOME `id` * \\ ; é"]

TRAINER = """#!{python} -IS
import json, os, signal, sys, time
with open(os.environ["STARTED"], "a") as file:
    file.write(json.dumps({{"arguments": sys.argv[1:], "directory": os.getcwd()}}) + "\\n")
code = os.environ.get("CODE", "0")
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    open(os.environ["STARTED"] + ".ready", "w").close()
    time.sleep(20)
sys.exit(int(code))
"""

FAKE_GCLOUD = """#!{python} -IS
import json, os, shutil, subprocess, sys
directory = os.environ["FAKE_CLOUD"]
words = sys.argv[1:]
with open(directory + "/calls.jsonl", "a") as file:
    file.write(json.dumps(words) + "\\n")
with open(directory + "/plan.json") as file:
    plan = json.load(file)

def leave(code, message=""):
    with open(directory + "/plan.json", "w") as file:
        json.dump(plan, file)
    print(message, file=sys.stderr if code else sys.stdout)
    sys.exit(code)

verb = words[3]
home = os.environ["HOME"]
if verb == "create":
    plan["states"] = plan["after_create"]
elif verb == "delete":
    plan["states"] = []
elif verb == "describe":
    if not plan["states"]:
        leave(1, "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    state = plan["states"].pop(0) if len(plan["states"]) > 1 else plan["states"][0]
    if state == "ERROR":
        leave(1, "ERROR: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE: try again")
    leave(0, state)
elif verb == "scp":
    shutil.copy(words[4], home + "/" + words[5].partition(":")[2])
elif verb == "ssh":
    (command,) = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    code = "0"
    if "exec ~/facevae_venv" in command:
        run = plan["runs"].pop(0)
        code = str(run["code"])
        plan["states"] = run.get("then", plan["states"])
        with open(directory + "/plan.json", "w") as file:
            json.dump(plan, file)
    result = subprocess.run(["bash", "-c", command], cwd=home, env=os.environ | {{"CODE": code}})
    sys.exit(result.returncode)
leave(0)
"""

UV = """#!/usr/bin/env bash
if [[ $1 == venv ]]; then
  mkdir -p "${!#}/bin"
  cp "$FAKE_CLOUD/trainer" "${!#}/bin/python"
fi
echo "uv $*" >>"$FAKE_CLOUD/hosts"
"""
NOTE = """#!/usr/bin/env bash
[[ $1 != tee ]] || cat >/dev/null
echo "${0##*/} $*" >>"$FAKE_CLOUD/hosts"
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def readme_command(script):
    """The words of README's command that starts with, or submits, a script."""
    readme = (REPOSITORY / "README.md").read_text()
    return next(
        shlex.split(line, comments=True)
        for line in readme.splitlines()
        if line.split("#")[0].count(script) and "`" not in line
    )


class Cloud:
    """A machine with the tests' gcloud, and the home directory that its hosts share."""

    def __init__(self, root):
        self.root = root
        self.home = root / "home"
        self.started = root / "started.jsonl"
        commands = root / "bin"
        for folder in (self.home, commands):
            folder.mkdir()
        executable(root / "trainer", TRAINER.format(python=sys.executable))
        executable(commands / "gcloud", FAKE_GCLOUD.format(python=sys.executable))
        executable(commands / "uv", UV)
        executable(commands / "mountpoint", "#!/bin/sh\nexit 1\n")
        for name in ("sudo", "gcsfuse", "curl"):
            executable(commands / name, NOTE)
        self.environment = os.environ | {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKE_CLOUD": str(root),
            "STARTED": str(self.started),
            "TPU_POLL_SECONDS": "0.01",
        }
        self.plan()

    def plan(self, *runs, states=(), after_create=("ACTIVE",)):
        """How each run ends ({"code": 143, "then": states}) and what `describe` answers, the last one for ever."""
        plan = {"runs": runs, "states": states, "after_create": after_create}
        (self.root / "plan.json").write_text(json.dumps(plan))

    def installed(self):
        """As after `install`, which takes a moment."""
        (self.home / "facevae_jax").symlink_to(REPOSITORY)
        venv = self.home / "facevae_venv" / "bin"
        venv.mkdir(parents=True)
        shutil.copy(self.root / "trainer", venv / "python")

    def arguments(self, verb, *words, kind="v5litepod-16"):
        options = ["--name=faces", "--zone=us-west4-a"]
        if verb in ("create", "resume", "supervise"):
            options.append(f"--accelerator-type={kind}")
        return [str(LAUNCH / "tpu.sh"), verb, *options, *words]

    def tpu(self, verb, *words):
        return subprocess.run(
            self.arguments(verb, *words), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self):
        """What gcloud was asked, in order: of ssh whether to install, run or stop."""

        def kind(words):
            if words[3] != "ssh":
                return words[3]
            command = next(word for word in words if word.startswith("--command="))
            return "run" if "exec ~/facevae_venv" in command else "install" if "uv venv" in command else "stop"

        return [kind(words) for words in lines(self.root / "calls.jsonl")]

    def trained(self):
        """What the trainer was started with, each time."""
        return [start["arguments"] for start in lines(self.started)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


RUN = ["-m", "facevae_jax.main"]
FLAGS = ["--config=configs/ffhq128.py", "--workdir=/mnt/facevae/run"]
BACK = ["delete", "create", "describe", "scp", "install"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    if SHELLCHECK is None:
        pytest.skip('shellcheck is not installed (pip install -e ".[dev]")')
    result = subprocess.run(
        [SHELLCHECK, "--external-sources", path], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_every_file_says_how_it_is_used_and_the_readme_names_it():
    readme = (REPOSITORY / "README.md").read_text()
    files = [path for path in LAUNCH.iterdir() if path.is_file()]
    assert len(files) >= 6
    for path in files:
        text = path.read_text().removeprefix("#!/usr/bin/env bash\n")
        head = text.split('"""')[1] if path.suffix == ".py" else "".join(_head(text))
        assert f"launch/{path.name}" in head, path
        assert path.suffix == ".py" or "# Usage" in head, path
        assert f"launch/{path.name}" in readme, path


def _head(text):
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            return
        yield line


# ---- flags.sh ----


def flags_of(platform, **environment):
    """The environment after `source launch/flags.sh platform`."""
    script = 'source launch/flags.sh "$1" && exec env -0'
    result = subprocess.run(
        ["bash", "-c", script, "bash", platform],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return result, dict(entry.split("=", 1) for entry in result.stdout.split("\0") if "=" in entry)


def start_jax(xla_flags):
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_installed_jaxlib_knows_every_flag():
    words = [word for name in ("gpu", "tpu", "cpu") for word in flags_of(name)[1].get("XLA_FLAGS", "").split()]
    assert words
    result = start_jax(" ".join(words))
    assert result.returncode == 0, result.stderr


def test_jaxlib_refuses_a_flag_that_it_does_not_know():
    result = start_jax("--xla_gpu_enable_triton_gemms=false")
    assert result.returncode != 0
    assert "Unknown flag" in result.stderr


def test_the_users_own_flags_win():
    result, environment = flags_of("gpu", XLA_FLAGS="--xla_gpu_enable_triton_gemm=true", JAX_PLATFORMS="rocm")
    assert result.returncode == 0, result.stderr
    assert environment["XLA_FLAGS"].split()[-1] == "--xla_gpu_enable_triton_gemm=true"
    assert environment["JAX_PLATFORMS"] == "rocm"
    assert flags_of("tpu", LIBTPU_INIT_ARGS="--xla_mine=1")[1]["LIBTPU_INIT_ARGS"] == "--xla_mine=1"


def test_a_platform_that_there_is_not():
    result, _ = flags_of("gpus")
    assert result.returncode == 2
    assert result.stderr == "error: launch/flags.sh: the platform 'gpus' must be one of gpu, tpu, cpu.\n"


# ---- tpu.sh ----


def test_a_slice_from_its_creation_over_a_preemption_to_its_end(cloud):
    cloud.plan(
        {"code": 143, "then": ["SUSPENDED"]},
        {"code": 0},
        after_create=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
    )
    assert cloud.tpu("status").stdout == "MISSING\n"
    for verb, words in (("create", ["--spot", "--project=my project"]), ("install", ["--mount=gs://my-bucket"])):
        result = cloud.tpu(verb, *words)
        assert result.returncode == 0, result.stderr
    assert cloud.tpu("run", "--", *ODD).returncode == 143
    assert cloud.tpu("status").stdout == "SUSPENDED\n"
    result = cloud.tpu("resume", "--spot", "--", *ODD)
    assert result.returncode == 0, result.stderr
    assert cloud.tpu("delete").returncode == 0

    created = ["create", "describe", "describe", "describe"]
    assert cloud.calls() == [
        *("describe", *created, "scp", "install", "run", "describe"),
        *("describe", "delete", *created, "scp", "install", "run", "delete"),
    ]
    assert cloud.trained() == [[*RUN, *ODD]] * 2
    assert (cloud.home / "facevae_jax" / "launch" / "tpu.sh").read_bytes() == (LAUNCH / "tpu.sh").read_bytes()
    assert not (cloud.home / "facevae_jax" / ".git").exists()
    hosts = (cloud.root / "hosts").read_text()
    assert "uv pip install --quiet --python" in hosts
    assert "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 my-bucket /mnt/facevae" in hosts
    where = ["--zone=us-west4-a", "--project=my project"]
    calls = lines(cloud.root / "calls.jsonl")
    assert calls[1] == [
        *("compute", "tpus", "queued-resources", "create", "faces", "--node-id=faces", *where),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--quiet"),
    ]
    assert calls[-1] == [
        *("compute", "tpus", "queued-resources", "delete", "faces", "--zone=us-west4-a", "--force", "--quiet")
    ]
    ssh = next(words for words in calls if words[3] == "ssh")
    assert ssh[:-1] == ["compute", "tpus", "tpu-vm", "ssh", "faces", "--zone=us-west4-a", "--worker=all", "--quiet"]


def test_supervise_brings_a_lost_slice_back_and_keeps_one_that_is_there(cloud):
    cloud.plan({"code": 255, "then": ["SUSPENDED"]}, {"code": 75}, {"code": 0})
    result = cloud.tpu("supervise", "--delete-when-done", "--", *ODD)
    assert result.returncode == 0, result.stderr
    first = ["describe", *BACK[1:], "run"]
    assert cloud.calls() == [*first, "describe", *BACK, "run", "describe", "run", "delete"]
    assert cloud.trained() == [[*RUN, *ODD]] * 3
    assert "exit code 255: starting again (1 of 10)" in result.stderr


def test_the_readmes_command(cloud):
    words = readme_command("launch/tpu.sh")
    cloud.plan({"code": 143, "then": ["SUSPENDED"]}, {"code": 0})
    result = subprocess.run(
        words, env=cloud.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert cloud.trained() == [[*RUN, *FLAGS]] * 2


def test_supervise_does_not_repeat_a_mistake(cloud):
    cloud.installed()
    cloud.plan({"code": 2}, {"code": 0}, states=["ACTIVE"])
    result = cloud.tpu("supervise", "--", *FLAGS)
    assert result.returncode == 2
    assert "not started again" in result.stderr
    assert cloud.calls() == ["describe", "run"]


def test_supervise_gives_up(cloud):
    cloud.installed()
    cloud.plan(*[{"code": code} for code in (75, 1, 139, 0)], states=["ACTIVE"])
    result = cloud.tpu("supervise", "--restarts=2", "--", *FLAGS)
    assert result.returncode == 139
    assert "the 2 restarts are used up" in result.stderr
    assert cloud.calls() == ["describe", "run"] * 3


def test_a_slice_is_not_deleted_because_gcloud_did_not_answer(cloud):
    cloud.installed()
    cloud.plan({"code": 0}, states=["ERROR", "ERROR", "ACTIVE"])
    result = cloud.tpu("resume", "--", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == ["describe", "describe", "describe", "run"]


def test_a_request_that_fails_ends_create(cloud):
    cloud.plan(after_create=["WAITING_FOR_RESOURCES", "FAILED"])
    result = cloud.tpu("create")
    assert result.returncode == 1
    assert "faces will not become ACTIVE" in result.stderr
    assert cloud.calls() == ["create", "describe", "describe"]


@pytest.mark.parametrize(("verb", "number"), [("run", signal.SIGINT), ("supervise", signal.SIGTERM)])
def test_a_signal_lets_the_hosts_save(cloud, verb, number):
    cloud.installed()
    cloud.plan({"code": "wait"}, states=["ACTIVE"])
    command = cloud.arguments(verb, "--", *FLAGS)
    with subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 20
        while not cloud.started.with_name("started.jsonl.ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 128 + number, errors
    assert cloud.calls()[-2:] == ["run", "stop"]


def test_run_first_stops_what_a_lost_connection_left(cloud):
    cloud.installed()
    cloud.plan({"code": 0}, states=["ACTIVE"])
    left = subprocess.Popen(
        [cloud.home / "facevae_venv" / "bin" / "python", *RUN, *FLAGS], env=cloud.environment | {"CODE": "wait"}
    )
    while not cloud.started.with_name("started.jsonl.ready").exists():
        time.sleep(0.02)
    (cloud.home / "facevae.pid").write_text(f"{left.pid}\n")
    ended = []
    command = cloud.arguments("run", "--", *FLAGS)
    with subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) as process:
        ended.append(left.wait(timeout=20))
        process.communicate(timeout=15)
    assert process.returncode == 0
    assert ended == [143]
    assert len(cloud.trained()) == 2


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ([], "''"),
        (["start", "--name=a", "--zone=b"], "'start'"),
        (["delete", "--zone=b"], "--name"),
        (["delete", "--name=a"], "--zone"),
        (["create", "--name=a", "--zone=b"], "--accelerator-type"),
        (["create", "--name=a", "--zone=b", "--accelerator-type=v4-8"], "--runtime-version"),
        (["run", "--name=a", "--zone=b"], "--config="),
        (["run", "--name=a", "--zone=b", "--", "--workdir=gs://bucket/run"], "--mount=BUCKET"),
        (["status", "--name=a", "--zone", "b"], "'--zone'"),
        (["install", "--name=a", "--zone=b", "--ref=main"], "--repo"),
        (["install", "--name=a", "--zone=b", "--mount=bucket/folder"], "bucket/folder"),
        (["supervise", "--name=a", "--zone=b", "--restarts=many"], "'many'"),
    ],
)
def test_one_line_says_what_is_missing(cloud, words, mentioned):
    result = subprocess.run(
        [LAUNCH / "tpu.sh", *words], env=cloud.environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert mentioned in line
    assert cloud.calls() == []


@pytest.fixture(scope="module")
def gcloud_commands(tmp_path_factory):
    """Every kind of command that tpu.sh gives to gcloud; the remote scripts are gcloud's business only as one word."""
    cloud = Cloud(tmp_path_factory.mktemp("cloud"))
    cloud.plan({"code": 0})
    options = ("--spot", "--project=mine", "--mount=bucket")
    result = cloud.tpu("resume", *options, "--", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert cloud.tpu("delete", *options).returncode == 0
    calls = lines(cloud.root / "calls.jsonl")
    commands = [["--command=x" if word.startswith("--command=") else word for word in words] for words in calls]
    return sorted({shlex.join(["gcloud", *words]) for words in commands})


def lint(commands, directory):
    """What gcloud's parser says about commands that it does not run."""
    file = directory / "commands.json"
    file.write_text(json.dumps([{"command_string": command} for command in commands]))
    result = subprocess.run(
        [GCLOUD, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env=os.environ | {"CLOUDSDK_CONFIG": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [entry["error_message"] for entry in json.loads(result.stdout)]


@pytest.mark.skipif(GCLOUD is None, reason="gcloud is not installed")
def test_gcloud_knows_every_command_and_option(gcloud_commands, tmp_path):
    assert len(gcloud_commands) == 5
    assert lint(gcloud_commands, tmp_path) == [None] * 5
    (message,) = lint([gcloud_commands[0] + " --spott"], tmp_path)
    assert "--spott" in message


# ---- jobset-*.yaml ----


def unknown_keys(given, kept, path=""):
    """Paths of `given` that are not in `kept`, or differ there."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [entry for key in given for entry in unknown_keys(given[key], kept.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [e for n, pair in enumerate(zip(given, kept, strict=True)) for e in unknown_keys(*pair, f"{path}[{n}]")]
    return [] if given == kept else [path]


def check_jobset(manifest):
    """Paths of a manifest that the API does not have; a value of the wrong type is a ValidationError (ValueError).

    The API is that of the models which the Kubeflow project generates from JobSet's and Kubernetes' own OpenAPI schema.
    """
    reason = 'needs kubeflow-trainer-api (pip install -e ".[dev]")'
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason=reason)
    return unknown_keys(manifest, models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict())


def job_of(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_has_only_what_the_api_has(path):
    manifest = yaml.safe_load(path.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert check_jobset(manifest) == []
    pod = job_of(manifest)["template"]["spec"]
    pod["terminationGracePeriodSecond"] = pod.pop("terminationGracePeriodSeconds")
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    assert check_jobset(manifest) == [
        ".spec.failurePolicy.maxRestart",
        ".spec.replicatedJobs[0].template.spec.template.spec.terminationGracePeriodSecond",
    ]
    pod["containers"][0]["ports"][0]["containerPort"] = "http"
    with pytest.raises(ValueError, match="containerPort"):
        check_jobset(manifest)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_ends_after_a_mistake_and_starts_all_again_otherwise(path):
    manifest = yaml.safe_load(path.read_text())
    policy, job = manifest["spec"]["failurePolicy"], job_of(manifest)
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": codes}]
    assert (job["backoffLimit"], pod["restartPolicy"], job["completionMode"]) == (0, "Never", "Indexed")
    assert pod["terminationGracePeriodSeconds"] >= 60
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volume["name"] for volume in pod["volumes"])
    assert "/dev/shm" in mounts
    (workdir,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--workdir=")]
    assert any(workdir.startswith(f"{mount}/") for mount in mounts)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_starts_the_trainer(path, cloud):
    job = job_of(yaml.safe_load(path.read_text()))
    (container,) = job["template"]["spec"]["containers"]
    values = {"JOBSET": "facevae", "REPLICATED_JOB": "workers", "JOB_COMPLETION_INDEX": "1"}
    values |= {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    shutil.copy(cloud.root / "trainer", cloud.root / "bin" / "python")
    result = subprocess.run(
        [*container["command"], *container["args"]], cwd=REPOSITORY, env=cloud.environment | values, check=False
    )
    assert result.returncode == 0
    (arguments,) = cloud.trained()
    flags = container["args"][2:]
    assert job["parallelism"] == job["completions"] > 1
    if path.name == "jobset-gpu.yaml":
        flags += [
            "--coordinator=facevae-workers-0-0.facevae:8476",
            f"--processes={job['parallelism']}",
            "--process_id=1",
        ]
    assert arguments == [*RUN, *flags]


# ---- slurm.sbatch ----

SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$FAKE_CLOUD/hosts"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""


@pytest.mark.parametrize(
    ("code", "restarts", "ends_with", "again"),
    [(0, 0, 0, False), (2, 0, 2, False), (143, 99, 143, True), (75, 0, 75, True), (1, 49, 1, True), (1, 50, 1, False)],
)
def test_slurm_queues_again_what_that_may_mend(cloud, code, restarts, ends_with, again):
    executable(cloud.root / "bin" / "srun", SRUN)
    executable(cloud.root / "bin" / "scontrol", NOTE)
    job = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
        "PYTHON": str(cloud.root / "trainer"),
        "CODE": str(code),
    }
    submit, script, *flags = readme_command("launch/slurm.sbatch")
    assert (submit, script) == ("sbatch", "launch/slurm.sbatch")
    given = [*flags, *ODD]
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", cloud.root / "slurm_script")  # as Slurm runs it
    result = subprocess.run(
        ["bash", spooled, *given], env=cloud.environment | job, capture_output=True, text=True, check=False
    )
    assert result.returncode == ends_with, result.stderr
    assert cloud.trained() == [[*RUN, *given]]
    hosts = (cloud.root / "hosts").read_text()
    assert ("scontrol requeue 17" in hosts) == again
    assert "srun --kill-on-bad-exit=1" in hosts


@pytest.fixture
def slurm(tmp_path):
    """The environment of a Slurm of two nodes that are never started."""
    for name in ("slurmctld", "sbatch", "scontrol"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
        "SlurmctldPort": port,
        "SlurmUser": getpass.getuser(),
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "StateSaveLocation": tmp_path,
        "SlurmctldPidFile": tmp_path / "pid",
        "SelectType": "select/cons_tres",
        "GresTypes": "gpu",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "ResumeProgram": "/bin/true",
        "SuspendProgram": "/bin/true",
        "SuspendTime": 3600,
        "NodeName": "n[1-2] CPUs=64 RealMemory=100000 Gres=gpu:8 State=CLOUD",
        "PartitionName": "all Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    }
    file = tmp_path / "slurm.conf"
    file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    environment = os.environ | {"SLURM_CONF": str(file)}
    with (tmp_path / "log").open("w") as log:
        controller = subprocess.Popen(["slurmctld", "-D", "-f", file], stdout=log, stderr=log)
    try:
        for _ in range(50):
            ping = subprocess.run(["scontrol", "ping"], env=environment, capture_output=True, text=True, check=False)
            if "is UP" in ping.stdout:
                break
            if controller.poll() is not None:
                pytest.skip(f"slurmctld does not start here: {(tmp_path / 'log').read_text().strip()[-200:]}")
            time.sleep(0.1)
        yield environment
    finally:
        controller.terminate()
        controller.wait(timeout=20)


def test_slurm_accepts_the_job(slurm):
    def submit(*options):
        command = ["sbatch", "--test-only", *options, "launch/slurm.sbatch", *FLAGS]
        return subprocess.run(command, cwd=REPOSITORY, env=slurm, capture_output=True, text=True, check=False)

    result = submit()
    assert result.returncode == 0, result.stderr
    assert "using 128 processors on nodes n[1-2]" in result.stderr
    assert submit("--gpus-per-node=9").returncode != 0
