"""The launch scripts: quoting, what they do after each exit code, and manifests that the API accepts.

There is no cloud here. A stand-in for `gcloud` answers from a plan and runs the remote commands on this machine, in a
home directory of its own, with a trainer that only writes down its arguments.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import REPOSITORY, assert_one_line_error

pytestmark = pytest.mark.slow
LAUNCH = REPOSITORY / "launch"
JOBSETS = sorted(LAUNCH.glob("jobset-*.yaml"))
SHELLCHECK = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
RUN = ["-m", "facevae_jax.main"]
ODD = ["--config=configs/ffhq128.py", "--workdir=/mnt/my runs/it's", '--config.data.name="a b"', "$HOME `id` * \\ ; é"]
START_JAX = "import jax; jax.devices()"
SECONDS = 300  # ends a hang

TRAINER = r"""#!/usr/bin/env bash
printf '%s\x1f' "$@" >>"$CLOUD/trained"
echo >>"$CLOUD/trained"
if [[ $CODE == wait ]]; then
  trap 'exit 143' TERM
  touch "$CLOUD/ready"
  for ((i = 0; i < 3000; i++)); do sleep 0.1; done
fi
exit "$CODE"
"""
GCLOUD = r"""#!/usr/bin/env bash
next() { # the first line of a file; the last one stays
  head -n 1 "$1"
  [[ $(wc -l <"$1") -le 1 ]] || sed -i 1d "$1"
}
verb=$4 command="${!#}"
case "$verb" in
  create) echo ACTIVE >"$CLOUD/states" ;;
  delete) : >"$CLOUD/states" ;;
  describe)
    state=$(next "$CLOUD/states")
    [[ $state != ERROR ]] || { echo "ERROR: UNAVAILABLE: try again" >&2 && exit 1; }
    [[ -n $state ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2 && exit 1; }
    echo "$state"
    ;;
  scp) cp "$5" "$HOME/${6#*:}" ;;
  ssh)
    verb=stop
    [[ $command != *"uv venv"* ]] || verb=install
    if [[ $command == *"exec ~/facevae_venv"* ]]; then
      verb=run
      read -r CODE state < <(next "$CLOUD/runs")
      [[ -z $state ]] || echo "$state" >"$CLOUD/states"
    fi
    ;;
esac
echo "$verb" >>"$CLOUD/calls"
[[ $4 != ssh ]] || CODE=$CODE exec bash -c "cd; ${command#--command=}"
"""
UV = r"""#!/usr/bin/env bash
[[ $1 != venv ]] || { mkdir -p "${!#}/bin" && cp "$CLOUD/bin/trainer" "${!#}/bin/python"; }
"""
NOTHING = "#!/usr/bin/env bash\n[[ $1 != tee ]] || cat >/dev/null\n"
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/usr/bin/env bash\necho "$*" >>"$CLOUD/calls"\n'


def readme_command(script):
    """The words of README's command for a script."""
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    return next(shlex.split(line, comments=True) for line in lines if script in line.split("#")[0] and "`" not in line)


_, _, *OPTIONS = readme_command("launch/tpu.sh")
OPTIONS = [*OPTIONS[: OPTIONS.index("--")], "--restarts=3", "--delete-when-done", *OPTIONS[OPTIONS.index("--") :], *ODD]
FLAGS = OPTIONS[OPTIONS.index("--") + 1 :]


class Cloud:
    """This machine with the stand-ins, and the home directory that all hosts share."""

    def __init__(self, root):
        self.root, self.home = root, root / "home"
        programs = {"trainer": TRAINER, "gcloud": GCLOUD, "uv": UV, "srun": SRUN, "scontrol": SCONTROL}
        programs |= dict.fromkeys(("sudo", "gcsfuse", "curl", "mountpoint"), NOTHING)
        (root / "bin").mkdir()
        for name, text in programs.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        stand_ins = {"PATH": path, "HOME": str(self.home), "CLOUD": str(root), "CODE": "0", "TPU_POLL_SECONDS": "0.01"}
        self.environment = os.environ | stand_ins
        self.home.mkdir()
        for name in ("calls", "trained"):
            (root / name).touch()

    def plan(self, *runs, states=()):
        """How each run ends ("CODE", or "CODE STATE" with the slice's state afterwards), and the states before."""
        (self.root / "runs").write_text("\n".join(runs) + "\n")
        (self.root / "states").write_text("".join(f"{state}\n" for state in states))
        if states:  # the code and the environment are there, as `install` leaves them
            (self.home / "facevae_jax").symlink_to(REPOSITORY)
            (self.home / "facevae_venv/bin").mkdir(parents=True)
            shutil.copy(self.root / "bin/trainer", self.home / "facevae_venv/bin/python")

    def run(self, *command, **environment):
        options = {"env": self.environment | environment, "cwd": REPOSITORY, "text": True, "timeout": SECONDS}
        return subprocess.run(command, **options, capture_output=True, check=False)

    def start(self, *command, **environment):
        """A process, once its trainer runs."""
        process = subprocess.Popen(command, env=self.environment | environment, cwd=REPOSITORY)
        deadline = time.monotonic() + SECONDS
        while not (self.root / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    def calls(self):
        """What gcloud and scontrol were asked for, but for states."""
        return [call for call in (self.root / "calls").read_text().split() if call not in ("describe", "scp")]

    def trained(self):
        """The trainer's arguments, each time that it was started."""
        return [line.split("\x1f")[:-1] for line in (self.root / "trained").read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("name", ["flags.sh", "tpu.sh", "slurm.sbatch"])
def test_shellcheck_finds_nothing(name):
    if SHELLCHECK is None:
        pytest.skip('shellcheck is not installed (pip install -e ".[dev]")')
    subprocess.run([SHELLCHECK, "--external-sources", LAUNCH / name], cwd=REPOSITORY, check=True)


def test_flags_are_known_to_jaxlib_and_the_users_own_win(cloud):
    for platform in ("gpu", "tpu", "cpu"):
        script = f"source launch/flags.sh {platform} && JAX_PLATFORMS=cpu exec '{sys.executable}' -c '{START_JAX}'"
        result = cloud.run("bash", "-c", script, XLA_FLAGS="")
        assert result.returncode == 0, result.stderr
    mine = "--xla_gpu_enable_triton_gemm=true"
    script = 'source launch/flags.sh gpu && echo "$XLA_FLAGS $JAX_PLATFORMS"'
    result = cloud.run("bash", "-c", script, XLA_FLAGS=mine, JAX_PLATFORMS="rocm")
    assert result.stdout.split()[-2:] == [mine, "rocm"]
    assert_one_line_error(cloud.run("bash", "launch/flags.sh", "gpus"), "'gpus'")


@pytest.mark.parametrize(
    ("states", "runs", "code", "calls"),
    [
        ((), "255 SUSPENDED,75,1,0", 0, "create install run delete create install run run run delete"),
        (("ACTIVE",), "2,0", 2, "run"),
        (("ACTIVE",), "75,1,75,139,0", 139, "run run run run"),
        (("ERROR", "ERROR", "ACTIVE"), "0", 0, "run delete"),
    ],
    ids=["a lost slice is brought back", "no mistake is repeated", "it gives up", "no answer is no lost slice"],
)
def test_supervise(cloud, states, runs, code, calls):
    cloud.plan(*runs.split(","), states=states)
    result = cloud.run("launch/tpu.sh", "supervise", *OPTIONS)
    assert result.returncode == code, result.stderr
    assert cloud.calls() == calls.split()
    assert cloud.trained() == [[*RUN, *FLAGS]] * cloud.calls().count("run")
    assert (cloud.home / "facevae_jax/launch/tpu.sh").read_bytes() == (LAUNCH / "tpu.sh").read_bytes()
    assert states or not (cloud.home / "facevae_jax/.git").exists()


@pytest.mark.parametrize(("verb", "number"), [("run", signal.SIGINT), ("supervise", signal.SIGTERM)])
def test_a_signal_lets_the_hosts_save(cloud, verb, number):
    cloud.plan("wait", states=["ACTIVE"])
    with cloud.start("launch/tpu.sh", verb, *OPTIONS) as process:
        process.send_signal(number)
        assert process.wait(timeout=SECONDS) == 128 + number
    assert cloud.calls().count("run") == 1


def test_run_first_stops_what_a_lost_connection_left(cloud):
    cloud.plan("0", states=["ACTIVE"])
    with cloud.start(cloud.home / "facevae_venv/bin/python", *RUN, *FLAGS, CODE="wait") as left:
        (cloud.home / "facevae.pid").write_text(f"{left.pid}\n")
        with cloud.start("launch/tpu.sh", "run", *OPTIONS) as process:
            assert left.wait(timeout=SECONDS) == 143  # reaped here, or its number would stay in use
            assert process.wait(timeout=SECONDS) == 0
    assert len(cloud.trained()) == 2


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["start", "--name=a", "--zone=b"], "'start'"),
        (["delete", "--zone=b"], "--name"),
        (["create", "--name=a", "--zone=b", "--accelerator-type=v4-8"], "--runtime-version"),
        (["run", "--name=a", "--zone=b", "--", "--workdir=gs://bucket/run"], "--mount=BUCKET"),
        (["status", "--name=a", "--zone", "b"], "'--zone'"),
        (["supervise", "--name=a", "--zone=b", "--restarts=many"], "'many'"),
    ],
)
def test_one_line_says_what_is_wrong(cloud, words, mentioned):
    assert_one_line_error(cloud.run("launch/tpu.sh", *words), mentioned)
    assert cloud.calls() == []


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_has_only_what_the_api_has(path):
    """The models are generated from JobSet's and Kubernetes' OpenAPI schema, and drop what that lacks."""
    reason = 'needs kubeflow-trainer-api (pip install -e ".[dev]")'
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason=reason)
    manifest = yaml.safe_load(path.read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]  # else no mistake would end the run
    for port in container["ports"]:
        port["protocol"] = "TCP"  # the default
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_starts_the_trainer(path, cloud):
    job = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    values = {"JOBSET": "facevae", "REPLICATED_JOB": "workers", "JOB_COMPLETION_INDEX": "1"}
    values |= {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    shutil.copy(cloud.root / "bin/trainer", cloud.root / "bin/python")
    assert cloud.run(*container["command"], *container["args"], **values).returncode == 0
    flags = container["args"][2:]
    if path.name == "jobset-gpu.yaml":
        coordinator = "--coordinator=facevae-workers-0-0.facevae:8476"
        flags += [coordinator, f"--processes={job['parallelism']}", "--process_id=1"]
    assert cloud.trained() == [[*RUN, *flags]]


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(0, 0, False), (2, 0, False), (143, 99, True), (1, 49, True), (1, 50, False)]
)
def test_slurm_queues_again_what_that_may_fix(cloud, code, restarts, again):
    job = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
        "PYTHON": str(cloud.root / "bin/trainer"),
        "CODE": str(code),
    }
    flags = [*readme_command("launch/slurm.sbatch")[2:], *ODD]
    spooled = shutil.copy(LAUNCH / "slurm.sbatch", cloud.root / "slurm_script")  # as Slurm runs it
    result = cloud.run("bash", spooled, *flags, **job)
    assert result.returncode == code, result.stderr
    assert cloud.trained() == [[*RUN, *flags]]
    assert (cloud.calls() == ["requeue", "17"]) == again
