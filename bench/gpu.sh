#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command: PYTHON=python3 bench/gpu.sh [OUTDIR]
#
# Builds fastedit._cuda in place, runs the tests marked gpu, the benches of ops, engines, tracing and neurons there, and
# collects bench/results/<device>-<date>.json and a table. Needs a Python with a CUDA build of torch, transformers, pytest,
# pytest-benchmark, pytest-timeout and hypothesis, and nvcc with cmake and pybind11 for the build; no network.
#
# Stops by itself after LIMIT seconds (540). Parts that passed are noted in OUTDIR/parts.json (default build/gpu) and are
# skipped the next time, so an interrupted run is continued by the same command. One line a part; the rest goes to
# OUTDIR/log.txt. ONLY=regex chooses parts, OPS="pytest -k expression" the op benches (by default GPT-J's shapes and
# those of no model; OPS=gpu is all); DRY=1 goes through the parts without a device (everything skips).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=$(mkdir -p "${1:-$root/build/gpu}" && cd "${1:-$root/build/gpu}" && pwd) || exit 2
limit=${LIMIT:-540}
log=$out/log.txt
failed=0 unfinished=0

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A virtual environment's cmake and ninja lie beside its python.
PATH=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH
# The package by itself on the path: the repository's kernels/ must not stand in for another distribution.
mkdir "$scratch/site" && ln -s "$root/fastedit" "$scratch/site/fastedit"
export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 FASTEDIT_BENCH_RESULTS=$out
if [ -z "${FASTEDIT_COMMIT:-}" ]; then
  FASTEDIT_COMMIT=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)
fi
export FASTEDIT_COMMIT

report() { "$python" "$root/bench/gpu_report.py" "$1" "$out" "${@:2}"; }

# part NAME SECONDS COMMAND...: run, note and print one line; NAME.json and NAME.xml in $scratch are its figures.
part() {
  local name=$1 cap=$2 start=$SECONDS left=$((limit - SECONDS)) rc status
  shift 2
  if [[ ! $name =~ ${ONLY:-.} ]]; then return; fi
  if [ "$name" != build ] && report has "$name"; then
    printf '%-24s passed before\n' "$name"
    return
  fi
  if [ "$left" -lt 20 ]; then
    printf '%-24s no time left\n' "$name"
    unfinished=1
    return
  fi
  echo "=== $name: $*" >>"$log"
  timeout --signal=INT --kill-after=10 "$((left < cap ? left : cap))" "$@" >"$scratch/output" 2>&1
  rc=$?
  cat "$scratch/output" >>"$log"
  case $rc in
    0 | 5) status=passed ;; # 5: pytest found no test
    124 | 137) status="out of time" unfinished=1 ;;
    *) status=failed failed=1 ;;
  esac
  report add "$name" "$status" "$((SECONDS - start))" "$scratch/$name.json" "$scratch/$name.xml"
  printf '%-24s %-11s %4d s  %s\n' "$name" "$status" "$((SECONDS - start))" \
    "$(grep -v '^[[:space:]]*$' "$scratch/output" | tail -n 1 | cut -c 1-140)"
}

# The module is what counts, not a note of an earlier run: OUTDIR may outlive the checkout. Nor is it another checkout's.
# shellcheck disable=SC2329 # these two are called by `part`, in a shell of their own
build() {
  local here='import pathlib, sys, fastedit._cuda as m
sys.exit(pathlib.Path(sys.argv[1]) not in pathlib.Path(m.__file__).resolve().parents)'
  if ! "$python" -c "$here" "$root" 2>/dev/null; then
    cd "$root" && "$python" setup.py -q build_ext --inplace && "$python" -c "$here" "$root" || return
  fi
  echo "fastedit._cuda is built"
}

# shellcheck disable=SC2329
run_pytest() {
  "$python" -m pytest --rootdir="$root" -c "$root/pyproject.toml" -p no:cacheprovider -q -m gpu "$@"
}

device=$(report check) || { echo "$device"; exit 2; }
printf '%s\n' "$device"
if [ -z "${DRY:-}" ]; then
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export FASTEDIT_CUDA=on CMAKE_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES:-$capability-real}
fi
export root python
export -f build run_pytest
cd "$scratch" || exit 2 # where `python -m pytest` puts the working directory on the path, it is an empty one

part build 240 bash -c build
part ceilings 60 "$python" "$root/bench/gpu_report.py" ceilings "$scratch/ceilings.json"
part tests 240 bash -c 'run_pytest "$@"' _ --junitxml="$scratch/tests.xml" "$root/tests"
part engines-latency 200 bash -c 'run_pytest "$@"' _ -s "$root/bench/test_engines_gpu.py" -k latency
part engines-memit 300 bash -c 'run_pytest "$@"' _ -s "$root/bench/test_engines_gpu.py" -k memit
part seeing-neurons 200 bash -c 'run_pytest "$@"' _ -s "$root/bench/test_seeing_gpu.py" -k neurons
part seeing-trace 200 bash -c 'run_pytest "$@"' _ -s "$root/bench/test_seeing_gpu.py" -k trace
for file in "$root"/bench/test_*.py; do
  name=$(basename "$file" .py)
  if [[ ! $name =~ ^test_(engines|seeing)_gpu$ ]] && grep -q 'mark\.gpu' "$file"; then
    part "op-${name#test_}" 240 bash -c 'run_pytest "$@"' _ --benchmark-enable \
      --benchmark-json="$scratch/op-${name#test_}.json" -k "${OPS:-gpu and not gpt2 and not llama}" "$file"
  fi
done

report collect
if [ "$unfinished" -ne 0 ]; then echo "unfinished: run the same command again"; fi
exit $((failed || unfinished))
