#!/usr/bin/env bash
# Runs a program on every worker of a Cloud TPU slice, with plain gcloud:
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --target=v5p:4x4x4 \
#     [--project=PROJECT] [--spot ...] -- PROGRAM [FLAG...]
#
# The slice is created unless it exists (other options go to gcloud's `create`),
# this checkout's commit is installed, and `python -m launch.PROGRAM FLAG...
# --distributed` is started on each worker. A program that is preempted, told to
# stop (exit code 143) or loses a worker (134, 255) is started again, on a new
# slice if necessary, and continues from its last checkpoint. Other exit codes
# end the script. The script must keep running, for instance in tmux. When it is
# started again, it ends the program that is still running.
set -euo pipefail

die() { echo "error: $*" >&2 && exit 2; }

name="" target="" place=() options=() pause="${TPU_POD_PAUSE:-30}"
while (($#)) && [[ "$1" != -- ]]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --target=*) target="${1#*=}" ;;
    --zone=* | --project=*) place+=("$1") ;;
    *) options+=("$1") ;;
  esac
  shift
done
(($# > 1)) || die "which program? It comes after --"
[[ -n "$name" && "${place[*]}" == *--zone=* ]] ||
  die "--name and --zone are needed"
[[ "$target" =~ ^(v4|v5e|v5p|v6e):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]] ||
  die "--target must be such as v5e:4x4 or v5p:4x4x4, found '$target'"
chips=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
case "${BASH_REMATCH[1]}" in # v4 and v5p count cores, two to a chip.
  v4) type="v4-$((2 * chips))" version=tpu-ubuntu2204-base ;;
  v5e) type="v5litepod-$chips" version=v2-alpha-tpuv5-lite ;;
  v5p) type="v5p-$((2 * chips))" version=v2-alpha-tpuv5 ;;
  v6e) type="v6e-$chips" version=v2-alpha-tpuv6e ;;
esac
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
home="dcvideogen_jax/$(git -C "$checkout" rev-parse --short=12 HEAD)"

tpu() { gcloud compute tpus tpu-vm "$@" "${place[@]}"; }
state() { tpu describe "$name" --format="value(state)"; }
on_all() {
  tpu ssh "$name" --worker=all --ssh-flag="-o ServerAliveInterval=30" \
    --command="$1"
}

make_ready() {
  local found
  while found="$(state || true)" && [[ "$found" != READY ]]; do
    [[ "$found" != @(PREEMPTED|TERMINATED) ]] ||
      tpu delete "$name" --quiet || sleep "$pause"
    tpu create "$name" --accelerator-type="$type" --version="$version" \
      "${options[@]}" || sleep "$pause"
  done
}

install() {
  git -C "$checkout" archive --format=tar.gz -o "$archive/commit.tar.gz" HEAD
  tpu scp "$archive/commit.tar.gz" "$name:" --worker=all && on_all "set -eu
    ! test -e $home/.installed || exit 0
    rm -rf $home
    mkdir -p $home
    tar -xzf commit.tar.gz -C $home
    PATH=\$HOME/.local/bin:\$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --quiet --python 3.12 $home/.venv
    uv pip install --quiet --python $home/.venv/bin/python \
      -r $home/requirements.txt -r $home/requirements-tpu.txt
    touch $home/.installed"
}

# A program that still runs gets SIGTERM, and saves, before this one starts.
line="$(printf "%q " .venv/bin/python -u -m "launch.$2" "${@:3}" --distributed)"
line="$(printf "%q" "echo \$\$ >../pid; exec $line")"
start="cd $home; pkill -F ../pid -f launch 2>/dev/null
  exec flock ../lock bash -c $line"

archive="$(mktemp -d)"
trap 'rm -rf "$archive"' EXIT
while true; do
  make_ready
  code=0
  { install && on_all "$start"; } || code=$?
  case "$code/$(state || true)" in
    0/* | 2/*) exit "$code" ;;
    134/* | 143/* | 255/*) ;;
    */READY) exit "$code" ;;
  esac
  echo "tpu_pod: ended with $code; starting again" >&2
  sleep "$pause"
done
