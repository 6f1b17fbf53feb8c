#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any number of hosts, by queued resources; recreates a lost slice and resumes.
#
# Usage: launch/tpu.sh VERB --name=NAME --zone=ZONE [options] [-- flags of facevae_jax.main]
#
#   create      requests the slice and waits until it is ACTIVE
#   install     puts this checkout (or --repo at --ref), a virtual environment and the mount on every host
#   run         runs the trainer once on every host and waits; the exit code is the trainer's
#   resume      run, after recreating a slice that is missing, SUSPENDED or FAILED (delete, create, install)
#   supervise   resume, repeated after each failure that a restart may fix, at most --restarts times
#   status      prints the state of the queued resource, or MISSING
#   delete      deletes the slice, or the request in the queue
#
# Options:
#   --project=PROJECT            default: from gcloud's configuration
#   --accelerator-type=TYPE      such as v5litepod-16 or v6e-32; for create, resume and supervise
#   --runtime-version=VERSION    default: known for v5litepod, v5p and v6e
#   --spot                       cheaper, may be preempted at any time; use supervise
#   --mount=BUCKET               mounts this Cloud Storage bucket by gcsfuse on every host, at
#   --mount-path=PATH            (default: /mnt/facevae); the workdir must be a folder that all hosts share
#   --repo=URL --ref=REF         install from git instead of this checkout
#   --restarts=N                 of supervise (default: 10)
#   --delete-when-done           supervise deletes the slice after exit code 0
#
# Examples: v5e with 16 chips (4 hosts), and v6e with 32 (8 hosts):
#   launch/tpu.sh supervise --name=faces --zone=us-west4-a --accelerator-type=v5litepod-16 --spot --mount=my-bucket \
#       -- --config=configs/ffhq128.py --workdir=/mnt/facevae/runs/ffhq128 --config.data.data_dir=gs://my-bucket/data
#   launch/tpu.sh create --name=faces --zone=us-east5-b --accelerator-type=v6e-32
#   launch/tpu.sh install --name=faces --zone=us-east5-b --mount=my-bucket
#   launch/tpu.sh run --name=faces --zone=us-east5-b --mount=my-bucket \
#       -- --config=configs/ffhq256.py --workdir=/mnt/facevae/runs/ffhq256 --config.data.data_dir=gs://my-bucket/data
#   launch/tpu.sh delete --name=faces --zone=us-east5-b
#
# Use a bucket in the slice's region with a hierarchical namespace, as checkpoints are renamed as folders. Ctrl-C during
# run, resume and supervise asks all hosts to save and stop. The slice costs money until it is deleted.
#
# Exit codes: 0 done; 2 a mistake in this command or the trainer's; otherwise the trainer's, or gcloud's.
# Environment: TPU_POLL_SECONDS (default: 20); TPU_WAIT_SECONDS, create's limit in the queue (default: a day).
set -euo pipefail

readonly POLL_SECONDS="${TPU_POLL_SECONDS:-20}" WAIT_SECONDS="${TPU_WAIT_SECONDS:-86400}"
SOURCE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly SOURCE

say() { echo "tpu.sh: $*" >&2; }

mistake() {
  echo "error: $*" >&2
  exit 2
}

need() { # need OPTION VALUE
  [[ -n "$2" ]] || mistake "$1 is needed for $verb: see the head of launch/tpu.sh."
}

# ---- the command line ----

verb="${1:-}"
case "$verb" in
  create | install | run | resume | supervise | status | delete) shift ;;
  *) mistake "'$verb' must be one of create, install, run, resume, supervise, status, delete." ;;
esac

name="" zone="" project="" type="" runtime="" spot="" mount="" mount_path=/mnt/facevae repo="" ref="" restarts=10
delete_when_done="" trainer=()
options=() # as they were given, for supervise
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --accelerator-type=*) type="${1#*=}" ;;
    --runtime-version=*) runtime="${1#*=}" ;;
    --spot) spot=1 ;;
    --mount=*) mount="${1#*=}" mount="${mount#gs://}" mount="${mount%/}" ;;
    --mount-path=*) mount_path="${1#*=}" ;;
    --repo=*) repo="${1#*=}" ;;
    --ref=*) ref="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --delete-when-done) delete_when_done=1 ;;
    --)
      shift
      trainer=("$@")
      break
      ;;
    *) mistake "'$1': options look like --name=value, and the trainer's flags follow --." ;;
  esac
  options+=("$1")
  shift
done

need --name "$name"
need --zone "$zone"
[[ "$restarts" =~ ^[0-9]+$ ]] || mistake "--restarts='$restarts' must be a whole number."
[[ -z "$mount" || "$mount" != */* ]] || mistake "--mount='$mount' must be a bucket's name, without a folder."
[[ "$mount_path" == /* ]] || mistake "--mount-path='$mount_path' must begin with /."
[[ -z "$ref" || -n "$repo" ]] || mistake "--ref='$ref' needs --repo=URL."
case "$verb" in
  create | resume | supervise)
    need --accelerator-type "$type"
    case "$type" in
      v5litepod-*) runtime="${runtime:-v2-alpha-tpuv5-lite}" ;;
      v5p-*) runtime="${runtime:-v2-alpha-tpuv5}" ;;
      v6e-*) runtime="${runtime:-v2-alpha-tpuv6e}" ;;
    esac
    need --runtime-version "$runtime"
    ;;
esac
case "$verb" in
  run | resume | supervise)
    ((${#trainer[@]})) || mistake "$verb needs the trainer's flags: -- --config=configs/ffhq128.py --workdir=..."
    for word in "${trainer[@]}"; do
      [[ "$word" != --workdir=gs://* ]] || mistake "$word must be a mounted folder: use --mount=BUCKET."
    done
    ;;
esac
command -v gcloud >/dev/null || mistake "gcloud is not installed: https://cloud.google.com/sdk/docs/install."

where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# ---- the slice ----

state() { # the state, or MISSING; repeated while gcloud fails, as a network failure must not delete a slice
  local answer attempt
  for ((attempt = 0; attempt < 10; attempt++)); do
    if answer="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' \
      2>"$scratch/describe")" && [[ -n "$answer" ]]; then
      echo "$answer"
      return
    elif grep -q 'NOT_FOUND:' "$scratch/describe"; then
      echo MISSING
      return
    fi
    cat "$scratch/describe" >&2
    sleep "$POLL_SECONDS"
  done
  say "gcloud does not report the state of $name"
  return 1
}

wait_until_active() {
  local now before="" deadline=$((SECONDS + WAIT_SECONDS))
  while :; do
    now="$(state)"
    [[ "$now" == "$before" ]] || say "$name is $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING)
        say "$name failed; see: gcloud compute tpus queued-resources describe $name ${where[*]}"
        return 1
        ;;
    esac
    if ((SECONDS >= deadline)); then
      say "$name is still $now after $WAIT_SECONDS s"
      return 1
    fi
    sleep "$POLL_SECONDS"
  done
}

create() {
  local request=("--node-id=$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime")
  [[ -z "$spot" ]] || request+=(--spot)
  gcloud compute tpus queued-resources create "$name" "${request[@]}" --quiet
  wait_until_active
}

delete() { gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

recreate() { # afterwards the slice is ACTIVE and has the code
  local now
  now="$(state)"
  case "$now" in
    ACTIVE) return ;;
    MISSING) create ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      say "$name is $now: requesting it again"
      delete
      create
      ;;
    *) wait_until_active ;; # it is in the queue
  esac
  install
}

# ---- its hosts ----

on_all_hosts() { # on_all_hosts SCRIPT: by the shell of every host; the exit code is the first that is not 0
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command="$1"
}

mount_script() {
  [[ -n "$mount" ]] || return 0
  printf 'bucket=%q path=%q\n' "$mount" "$mount_path"
  cat <<'SCRIPT'
if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -y -qq gcsfuse
fi
if ! mountpoint -q "$path"; then
  sudo mkdir -p "$path"
  sudo chown "$(id -u):$(id -g)" "$path"
  # No metadata cache: the hosts must see each other's checkpoints at once.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$bucket" "$path"
fi
SCRIPT
}

install_script() {
  printf 'set -euo pipefail\nrepo=%q ref=%q\n' "$repo" "$ref"
  cat <<'SCRIPT'
rm -rf ~/facevae_jax
if [[ -n "$repo" ]]; then
  git clone --quiet "$repo" ~/facevae_jax
  [[ -z "$ref" ]] || git -C ~/facevae_jax checkout --quiet "$ref"
else
  mkdir ~/facevae_jax
  tar -xzf ~/facevae_jax.tar.gz -C ~/facevae_jax
fi
# TPU images have Python 3.10, which is too old: uv installs its own.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -x ~/facevae_venv/bin/python ]] || uv venv --quiet --python 3.12 ~/facevae_venv
cd ~/facevae_jax
uv pip install --quiet --python ~/facevae_venv/bin/python -e ".[tpu]"
# libtpu starts and ends much faster with huge pages, and JAX warns without them.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
SCRIPT
  mount_script
}

install() {
  if [[ -z "$repo" ]]; then
    if git -C "$SOURCE" rev-parse --git-dir >/dev/null 2>&1; then
      git -C "$SOURCE" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        if [[ -e "$SOURCE/$file" ]]; then printf '%s\0' "$file"; fi # git also lists what was deleted but not committed
      done >"$scratch/files"
    else
      (cd "$SOURCE" && find . -type f ! -path './.*' -print0) >"$scratch/files"
    fi
    tar -czf "$scratch/facevae_jax.tar.gz" -C "$SOURCE" --null -T "$scratch/files"
    gcloud compute tpus tpu-vm scp "$scratch/facevae_jax.tar.gz" "$name:facevae_jax.tar.gz" "${where[@]}" \
      --worker=all --quiet
  fi
  on_all_hosts "$(install_script)"
}

# Asks a trainer that a lost connection left on a host to save and stop: while it runs, no other process can use the
# chips. It is identified by its process id and its command.
# shellcheck disable=SC2016
readonly STOP_SCRIPT='pid="$(cat ~/facevae.pid 2>/dev/null || true)"
ours() { [[ -n "$pid" ]] && tr "\0" " " <"/proc/$pid/cmdline" 2>/dev/null | grep -q facevae_jax.main; }
if ours; then
  kill -TERM "$pid" || true
  for ((turn = 0; turn < 600; turn++)); do
    ours || break
    sleep 0.2
  done
  ! ours || kill -KILL "$pid"
fi'

run_script() {
  printf 'set -euo pipefail\n%s\n' "$STOP_SCRIPT"
  mount_script
  cat <<'SCRIPT'
cd ~/facevae_jax
source launch/flags.sh tpu
echo "$$" >~/facevae.pid
SCRIPT
  printf 'exec ~/facevae_venv/bin/python -m facevae_jax.main'
  printf ' %q' "${trainer[@]}"
  echo
}

stopped=0    # the number of the first signal
on_signal="" # the function that handles it
child=""
code=0

in_background() { # in_background ON_SIGNAL COMMAND...: waits for it and sets `code` to its exit code
  on_signal="$1"
  shift
  "$@" & # in the background Ctrl-C does not reach it, so it keeps running while the hosts save
  child=$!
  trap 'stop 2' INT
  trap 'stop 15' TERM
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  trap - INT TERM
  if ((stopped && code)); then code=$((128 + stopped)); fi
}

stop() { # the second signal exits at once
  if ((stopped)); then exit $((128 + stopped)); fi
  stopped="$1"
  "$on_signal"
}

save_all() {
  say "asking all hosts to save and stop; a second signal does not wait for them"
  on_all_hosts "$STOP_SCRIPT" || true
}

run() {
  in_background save_all on_all_hosts "$(run_script)"
  return "$code"
}

pass_on() { kill -TERM "$child"; }

supervise() { # runs resume as a separate process, which exits at the first failure; signals are passed on
  local attempt
  for ((attempt = 0; ; attempt++)); do
    in_background pass_on bash "${BASH_SOURCE[0]}" resume "${options[@]}" -- "${trainer[@]}"
    if ((code == 0)); then
      if [[ -n "$delete_when_done" ]]; then delete; fi
      return 0
    fi
    if ((stopped)); then return "$code"; fi
    if ((code == 2)); then
      say "the command is wrong (exit code 2): no restart; $name is kept"
      return 2
    fi
    if ((attempt >= restarts)); then
      say "exit code $code after $restarts restarts: giving up; $name is kept"
      return "$code"
    fi
    say "exit code $code: restart $((attempt + 1)) of $restarts"
    sleep "$POLL_SECONDS" # until a preemption shows in the state
  done
}

case "$verb" in
  status) state ;;
  resume)
    recreate
    run
    ;;
  *) "$verb" ;;
esac
