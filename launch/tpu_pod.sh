#!/usr/bin/env bash
# Runs a program on every worker of a Cloud TPU slice, until it is done.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --target=v5p:4x4x4 [OPTION...] \
#     -- PROGRAM [FLAG...]
#
# makes or reuses the slice, installs this checkout's commit on its workers,
# starts `python -m launch.PROGRAM FLAG... --distributed` on each, and shows
# what worker 0 says. The program does not need this script to go on: started
# again with the same arguments, the script attaches to it.
#
# What is preempted or told to stop (exit code 143) is started again, on a new
# slice if need be, and continues from its last checkpoint; so is what fails
# otherwise, a few times in a row. Bad input (exit code 2) is not tried again.
#
#   --target=KIND:TOPOLOGY  as of launch.plan: v4, v5e, v5p or v6e
#   --project=PROJECT       unset: as gcloud has it
#   --version=VERSION       software of the workers; unset: that of the kind
#   --spot                  cheap, and preempted
#   --queued                asks for a queued resource of the same name
#   --retries=3             failures in a row, but for preemption
#   --poll=30               seconds between looks at the workers
#   --stop                  only ends the program with SIGTERM, which saves;
#                           end a script that follows it first
#   --delete                deletes the slice once the program is done
#   --dry_run               only prints the commands, for a new slice
#
# Ends with 0, with 2 for bad input, and with 1 for all else. gcloud must be
# logged in, and its key known to the ssh agent:
# ssh-add ~/.ssh/google_compute_engine
set -euo pipefail

name="" zone="" target="" project="" version="" retries=3 poll=30
spot="" queued="" stop="" delete="" dry_run=""
readonly home="dcvideogen_jax"  # On the workers, in the user's directory.
readonly long=1800              # Seconds after which a failure is the first.

die() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "tpu_pod: $*" >&2; }

parse() {
  while (($#)); do
    case "$1" in
      --name=* | --zone=* | --target=* | --project=* | --version=* | \
        --retries=* | --poll=*)
        local option="${1%%=*}"
        printf -v "${option#--}" "%s" "${1#*=}"
        ;;
      --spot | --queued | --stop | --delete | --dry_run)
        printf -v "${1#--}" "yes"
        ;;
      --)
        shift
        break
        ;;
      *) die "there is no option $1: the program comes after --" ;;
    esac
    shift
  done
  [[ -n "$name" && -n "$zone" ]] || die "--name and --zone are needed"
  [[ "$retries/$poll" =~ ^[0-9]+/[0-9.]+$ ]] || die "--retries and --poll are numbers"
  [[ -z "$stop" ]] || return 0
  (($#)) || die "which program? It comes after --"
  program=("$@")
  [[ "$target" =~ ^(v4|v5e|v5p|v6e):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]] ||
    die "--target must be such as v5e:4x4 or v5p:4x4x4, found '$target'"
  local chips=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
  topology="${target#*:}"
  # These are named after their cores, of which a chip has two.
  case "${target%%:*}" in
    v4) type="v4-$((2 * chips))" default="tpu-ubuntu2204-base" ;;
    v5e) type="v5litepod-$chips" default="v2-alpha-tpuv5-lite" ;;
    v5p) type="v5p-$((2 * chips))" default="v2-alpha-tpuv5" ;;
    v6e) type="v6e-$chips" default="v2-alpha-tpuv6e" ;;
  esac
  version="${version:-$default}"
}

# gcloud compute tpus, or with --dry_run its command line.
tpus() {
  local command=(gcloud compute tpus "$@" "--zone=$zone")
  [[ -z "$project" ]] || command+=("--project=$project")
  if [[ -n "$dry_run" ]]; then
    printf "%q " "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

# Runs a shell script on a worker, or on "all".
on() { tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"; }

# A field of the slice or of its queued resource; MISSING if there is none.
describe() {
  local errors found
  errors="$(mktemp)"
  if found="$(tpus "$1" describe "$name" "--format=value($2)" 2>"$errors")"; then
    echo "$found"
  elif grep -q NOT_FOUND "$errors"; then
    echo MISSING
  else
    cat "$errors" >&2
    echo UNREACHABLE
  fi
  rm -f "$errors"
}

# READY, PREEMPTED, MISSING, or something to wait for.
state() {
  local found=ACTIVE
  [[ -z "$queued" ]] || found="$(describe queued-resources state.state)"
  [[ "$found" != ACTIVE ]] || found="$(describe tpu-vm state)"
  case "$found" in
    TERMINATED | SUSPENDED) echo PREEMPTED ;;
    *) echo "$found" ;;
  esac
}

create() {
  local options=("--accelerator-type=$type")
  [[ -z "$spot" ]] || options+=(--spot)
  if [[ -n "$queued" ]]; then
    tpus queued-resources create "$name" "--node-id=$name" \
      "--runtime-version=$version" "${options[@]}"
  else
    tpus tpu-vm create "$name" "--version=$version" "${options[@]}"
  fi
}

remove() {
  if [[ -n "$queued" ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# Tries until there is room for the slice; other refusals end the script.
create_when_there_is_room() {
  local errors
  errors="$(mktemp)"
  until create 2>"$errors"; do
    cat "$errors" >&2
    grep -qiE "capacity|stockout|unavailable|internal error" "$errors" ||
      die "the slice $name cannot be made; see above"
    say "no room for $type in $zone yet"
    sleep "$poll"
  done
  rm -f "$errors"
}

make_ready() {
  local found last=""
  while true; do
    found="$(state)"
    [[ "$found" == "$last" ]] || say "$name is $found"
    last="$found"
    case "$found" in
      READY) break ;;
      MISSING) create_when_there_is_room ;;
      PREEMPTED) remove ;;
      STOPPED | STOPPING | HIDDEN) die "$name is $found: start or delete it" ;;
      FAILED) die "$name has failed: look why, and delete it" ;;
      *) sleep "$poll" ;;
    esac
  done
  found="$(describe tpu-vm acceleratorConfig.topology)"
  [[ -z "$found" || "$found" == "$topology" ]] ||
    die "$name is of topology $found, expected $topology"
}

# Puts the commit on all workers, unless it is there.
install() {
  if [[ -z "$dry_run" ]] && on all "test -e $place/.installed"; then
    return
  fi
  say "installing $commit"
  local archive
  archive="$(mktemp -d)"
  git -C "$checkout" archive --format=tar.gz -o "$archive/$home.tar.gz" HEAD
  tpus tpu-vm scp "$archive/$home.tar.gz" "$name:" --worker=all &&
    on all "set -eu
      ! test -e $place/.installed || exit 0
      rm -rf $place
      mkdir -p $place
      tar -xzf $home.tar.gz -C $place
      PATH=\$HOME/.local/bin:\$PATH
      command -v uv >/dev/null ||
        curl -LsSf https://astral.sh/uv/install.sh | sh -s -- --quiet
      uv venv --quiet --python 3.12 $place/.venv
      uv pip install --quiet --python $place/.venv/bin/python \
        -r $place/requirements.txt -r $place/requirements-tpu.txt
      touch $place/.installed"
  local code=$?
  rm -rf "$archive"
  return "$code"
}

# Starts the program on all workers, unless it runs; 2 if another one does.
start() {
  local line
  line="$(printf "%q " .venv/bin/python -m "launch.${program[0]}" \
    "${program[@]:1}" --distributed)"
  # The shell outlives SIGTERM, which its whole group gets, to write the code.
  local wrapper="trap : TERM
    cd $commit
    PYTHONUNBUFFERED=1 $line
    echo \$? >../run/code.new
    mv ../run/code.new ../run/code"
  on all "set -eu
    cd $home
    wanted=$(printf "%q" "$wrapper")
    if ! test -e run/code &&
      kill -0 -- \"-\$(cat run/pid 2>/dev/null)\" 2>/dev/null; then
      test \"\$wanted\" = \"\$(cat run/command)\" && exit 0
      echo 'something else runs here: end it with --stop' >&2
      exit 2
    fi
    rm -rf run
    mkdir run
    echo \"\$wanted\" >run/command
    setsid bash -c \"\$wanted\" >run/log 2>&1 </dev/null &
    echo \$! >run/pid"
}

# What came of the program: a line for each worker, with the exit code,
# "running", or "lost" if it ended without a word.
codes() {
  on all "cd $home/run
    if test -e code; then cat code
    elif kill -0 -- \"-\$(cat pid)\" 2>/dev/null; then echo running
    else echo lost; fi"
}

# Ends the program everywhere, with a minute to save.
halt() {
  on all "cd $home/run || exit 0
    group=-\$(cat pid)
    kill -TERM -- \"\$group\" 2>/dev/null || exit 0
    for i in \$(seq 240); do
      kill -0 -- \"\$group\" 2>/dev/null || exit 0
      sleep 0.25
    done
    kill -KILL -- \"\$group\" 2>/dev/null || true"
}

# Shows the log of worker 0 while the program runs, and sets `result`: "done",
# "bad_input", "stopped", "failed", or "gone" with the slice.
follow() {
  local chunk found offset=0
  result=gone
  chunk="$(mktemp)"
  while true; do
    on 0 "cd $home/run
      timeout $poll tail -c +$((offset + 1)) -f --pid=\$(cat pid) log || true" |
      tee "$chunk" || true
    offset=$((offset + $(wc -c <"$chunk")))
    if ! found="$(codes)"; then
      [[ "$(state)" == READY ]] || break
      say "not all workers of $name answer"
      sleep "$poll"
      continue
    fi
    if [[ -n "$dry_run" ]]; then
      echo "$found"
      found=0
    fi
    case " $(tr "\n" " " <<<"$found")" in
      *" 2 "*) result=bad_input ;;
      *" 143 "*) result=stopped ;;
      *" lost "* | *" "[1-9]*) result=failed ;;
      *running*) continue ;;
      *" 0 "*) result=done ;;
      *) continue ;;
    esac
    break
  done
  # What was said since the last look.
  [[ "$result" == gone ]] ||
    on 0 "tail -c +$((offset + 1)) $home/run/log" || true
  rm -f "$chunk"
}

# What the workers that failed said last.
tell_failures() {
  on all "cd $home/run
    code=\$(cat code 2>/dev/null || echo lost)
    case \$code in
      0 | 143) ;;
      *) echo \"--- \$(hostname): \$code\"; tail -n 20 log ;;
    esac" >&2 || true
}

main() {
  parse "$@"
  checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  commit="$(git -C "$checkout" rev-parse --short=12 HEAD)"
  place="$home/$commit"
  if [[ -n "$stop" ]]; then
    halt
    exit
  fi
  [[ -z "$(git -C "$checkout" status --porcelain)" ]] ||
    say "what is not committed stays here"
  local failures=0 began code
  while true; do
    began=$SECONDS
    result=failed
    if [[ -n "$dry_run" ]]; then create; else make_ready; fi
    if install; then
      code=0
      start || code=$?
      ((code != 2)) || die "$name is taken; see above"
      ((code)) || follow
    fi
    case "$result" in
      bad_input | failed) tell_failures ;;
    esac
    case "$result" in
      done) break ;;
      gone) ;;
      *) halt || true ;;
    esac
    ((SECONDS - began < long)) || failures=0
    case "$result" in
      bad_input) die "the program refuses its input; see above" ;;
      failed) failures=$((failures + 1)) ;;
    esac
    if ((failures > retries)); then
      say "failed $failures times in a row"
      exit 1
    fi
    say "$result: starting again"
  done
  [[ -z "$delete" ]] || remove
}

main "$@"
