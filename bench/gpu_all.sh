#!/usr/bin/env bash
# All that a GPU machine is asked for, in one command that needs no terminal and no network: installs this checkout,
# runs the tests that need a GPU, measures, and leaves JSON, picture and logs in one folder. A stage that fails or takes
# too long does not stop the ones after it. Exits with 0 if every stage succeeded, 1 if not, 2 for wrong arguments.
set -u
exec </dev/null

usage() {
  cat <<'TEXT'
usage: bench/gpu_all.sh [options] OUT

OUT             folder for gpu.json, gpu.png, gpu-triton.json, tests.xml, summary.txt and a log of each stage; where they
                are on PATH, memcheck.log and racecheck.log of compute-sanitizer and profile.log of ncu
--python FILE   the interpreter to use; default python3
--wheels DIR    install what is missing from the wheels there: scikit-build-core, pybind11, pytest, cmake, ninja, peers
--minutes N     for the benchmark; default 7.5
--no-build      use the irlfast that is installed
--no-tests      do not run the tests
--no-bench      do not measure
TEXT
}

python=python3 wheels='' minutes=7.5 build=1 tests=1 bench=1 out=''
while (($#)); do
  case $1 in
    --python | --wheels | --minutes)
      if (($# < 2)); then
        echo "gpu_all.sh: $1 needs a value" >&2
        exit 2
      fi
      declare "${1#--}=$2"
      shift 2
      ;;
    --no-build) build=0 && shift ;;
    --no-tests) tests=0 && shift ;;
    --no-bench) bench=0 && shift ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*)
      echo "gpu_all.sh: $1 is no option" >&2
      usage >&2
      exit 2
      ;;
    *)
      if [[ -n $out ]]; then
        echo "gpu_all.sh: one folder OUT, not $out and $1" >&2
        exit 2
      fi
      out=$1
      shift
      ;;
  esac
done
if [[ -z $out ]]; then
  usage >&2
  exit 2
fi
if ! [[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
  echo "gpu_all.sh: --minutes $minutes is no number" >&2
  exit 2
fi
if [[ -n $wheels ]]; then wheels=$(realpath -m -- "$wheels"); fi
# Not to where it links: a virtual environment is known by the path of its interpreter.
if [[ $python == */* ]]; then python=$(realpath -s -- "$python"); fi
mkdir -p "$out" || exit 2
out=$(realpath -- "$out")
cd "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 2

failures=0
: >"$out/summary.txt"

report() {
  echo "$*" | tee -a "$out/summary.txt"
}

# stage NAME SECONDS COMMAND...: its output goes to NAME.log and its outcome to the summary.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  if ((status == 0)); then
    report "$name: done in $((SECONDS - begin)) s"
  elif ((status == 124 || status == 137)); then
    report "$name: FAILED, stopped after $limit s; see $name.log"
  else
    report "$name: FAILED with code $status after $((SECONDS - begin)) s; see $name.log"
  fi
  if ((status)); then
    failures=$((failures + 1))
    tail -n 15 "$out/$name.log"
  fi
  return "$status"
}

has() {
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1" 2>/dev/null
}

# Where pip takes the wheels of a folder and asks no index.
offline=(--no-index --no-deps)
if [[ -n $wheels ]]; then offline+=(--find-links "$wheels"); fi

stage versions 120 "$python" -c '
import importlib.metadata, platform, shutil, subprocess, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
for name in ("triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
print("gpus:", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
if shutil.which("nvidia-smi"):
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
'

if [[ -n $wheels ]]; then
  for wheel in "$wheels"/*.whl; do
    [[ -e $wheel ]] || continue
    name=$(basename -- "$wheel")
    stage "wheel-${name%%-*}" 120 "$python" -m pip install "${offline[@]}" "$wheel"
  done
fi

if ((build)); then
  missing=''
  for module in scikit_build_core pybind11; do
    has "$module" || missing+=" ${module//_/-}"
  done
  has cmake || command -v cmake >/dev/null || missing+=' cmake'
  command -v c++ >/dev/null || command -v g++ >/dev/null || missing+=' a-C++-compiler'
  if [[ -n $missing ]]; then
    failures=$((failures + 1))
    report "build: FAILED, missing:$missing; give --wheels DIR, or --no-build where irlfast is installed"
  else
    stage build 420 "$python" -m pip install "${offline[@]}" --no-build-isolation -e .
  fi
fi
stage import 120 "$python" -c 'import irlfast.ops, irlfast._native as native; print(native.build_info())'

gpu=0
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then gpu=1; fi
if ((!gpu)); then report 'gpu: torch is missing or sees none, so there is nothing to test or measure on one'; fi

if ((tests && gpu)); then
  if has pytest; then
    stage tests 600 "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml "$out/tests.xml" tests/kernels tests/cuda
    tail -n 1 "$out/tests.log" | tee -a "$out/summary.txt"
  else
    failures=$((failures + 1))
    report 'tests: FAILED, pytest is missing; give --wheels DIR'
  fi
fi

# The CUDA kernels under NVIDIA's tools, whose findings are text. A few cases: each takes far longer under them.
if ((tests && gpu)) && has pytest; then
  few='test_rows_at_any_address and 131 or test_several_labels or test_layout'
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      stage "$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q -m gpu -p no:cacheprovider -k "$few" tests/cuda
    done
  else
    report 'compute-sanitizer: not on PATH, so neither memory nor races were checked'
  fi
  if command -v ncu >/dev/null; then
    stage profile 300 ncu --kernel-name-base demangled --kernel-name 'regex:token_(stats|kl)|policy_terms|sequence_|importance_' \
      --launch-count 12 --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis \
      "$python" -c '
import torch
from irlfast.ops import token_kl, token_stats
logits = torch.randn(8192, 128256, device="cuda", dtype=torch.bfloat16).requires_grad_()
labels = torch.randint(128256, (8192,), device="cuda")
stats = token_stats(logits, labels)
(stats.logprob + stats.entropy).sum().backward()
token_kl(logits, logits.detach() * 0.9).sum().backward()
'
  else
    report 'ncu: not on PATH, so no kernel was profiled'
  fi
fi

if ((bench)); then
  whole=${minutes%.*} # the benchmark ends by itself; this is for one that hangs
  stage bench $((60 * 10#$whole + 120)) "$python" -m bench gpu --budget-minutes "$minutes" --json "$out/gpu.json" --plot "$out/gpu.png"
  # The same ops by their Triton kernels: what "auto" should take is settled by the two files.
  stage bench-triton 360 "$python" -m bench gpu --without cuda --lines A,B,C,E --skip eager,compile,peer --budget-minutes 4 --json "$out/gpu-triton.json"
fi

report "$( ((failures)) && echo "$failures stages FAILED" || echo 'every stage succeeded')"
exit $((failures > 0))
