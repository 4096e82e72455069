#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with one: builds, tests, checks with compute-sanitizer, measures,
# and writes one result file.
#   bench/gpu_suite.sh [option...] [stage...]     all stages, or those named
#   --prefix DIR   where doctest and Google Benchmark are, if the system has none (their Debian packages,
#                  unpacked with dpkg -x, will do: DIR/usr)
#   --build DIR    build folder (build/gpu_suite); stages find there what an earlier call built
#   --out FILE     result file (gpu_suite.txt in the build folder)
#   --commit ID    what is measured, if this is no git checkout
#   --list         the stages
# Every stage ends within 9 minutes, or fails. A line per stage, and last "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."

stages=(build test memcheck racecheck initcheck synccheck bench peers)
limit=540 build=build/gpu_suite prefix= out= commit= chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --prefix) prefix=$(cd "$2" && pwd) || exit 2; shift ;;
    --build) build=$2; shift ;;
    --out) out=$2; shift ;;
    --commit) commit=$2; shift ;;
    --list) printf '%s\n' "${stages[@]}"; exit 0 ;;
    -*) echo "no option $1; see the head of $0" >&2; exit 2 ;;
    *)
      [[ " ${stages[*]} " == *" $1 "* ]] || {
        echo "there is no stage $1; $0 --list" >&2
        exit 2
      }
      chosen+=("$1")
      ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${stages[@]}")
out=${out:-$build/gpu_suite.txt}
commit=${commit:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
mkdir -p "$build" "$(dirname "$out")"
jobs=$(nproc)
export MOE_REQUIRE_GPU=1

say() { echo "$*" | tee -a "$out"; }
programs() { find "$build" -type f -perm -u+x -name "$1" | sort; }

stage_build() {
  local arch generator=()
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return
  [ "$arch" != 90 ] || arch=90a
  ! command -v ninja > /dev/null || generator=(-G Ninja)
  cmake --preset cuda -B "$build" "${generator[@]}" -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
    -DCMAKE_PREFIX_PATH="$prefix" -DMOE_WARNINGS_AS_ERRORS=OFF &&
    cmake --build "$build" --target moe_cuda_programs -j "$jobs"
}

# Every test case, none skipped.
stage_test() { ctest --test-dir "$build" -L gpu --output-on-failure --no-tests=error; }

# The tests under a tool of compute-sanitizer, without the test cases that are called "large": the tools slow
# kernels down a hundred times. Where there is NCCL, tests of it run on all GPUs, examples and benchmarks too.
sanitize() {
  command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer here"; return 1; }
  local program status=0 found=0
  for program in $(programs 'moe_test_gpu_*'); do
    if [[ $program = *_comm && $1 != memcheck ]]; then
      say "  $(basename "$program"): left out, its kernels are NCCL's"
      continue
    fi
    found=1
    if compute-sanitizer --tool "$1" --error-exitcode 9 --launch-timeout 120 "$program" \
      --test-case-exclude='*large*' > "$build/sanitize.log" 2>&1; then
      say "  $(basename "$program"): $(grep -o '[A-Z]* SUMMARY:.*' "$build/sanitize.log" | tail -n 1)"
    else
      say "  $(basename "$program"): FAILED"
      tail -n 30 "$build/sanitize.log"
      status=1
    fi
  done
  [ $found = 1 ] && return $status
}
stage_memcheck() { sanitize memcheck; }
stage_racecheck() { sanitize racecheck; }
stage_initcheck() { sanitize initcheck; }
stage_synccheck() { sanitize synccheck; }

# Each benchmark verifies before it measures; Google Benchmark ends with 0 after an error, so look for the word.
stage_bench() {
  local program status=0 found=0
  for program in $(programs 'moe_bench_gpu_*'); do
    found=1
    "$program" --benchmark_min_time=0.05 > "$build/bench.log" 2> "$build/bench.err" || status=1
    grep -q 'ERROR OCCURRED' "$build/bench.log" && status=1
    say "$(basename "$program")"
    grep '/' "$build/bench.log" | sed 's/  */ /g; s/iterations:[0-9]*//' | tee -a "$out"
    [ $status = 0 ] || cat "$build/bench.err"
  done
  [ $found = 1 ] && return $status
}

# What users of PyTorch have instead, in the same units.
stage_peers() {
  python3 -c 'import torch; assert torch.cuda.is_available()' || return
  local peer status=0
  for peer in bench/peers/*.py; do
    say "$peer"
    PYTHONUNBUFFERED=1 python3 "$peer" > "$build/peer.log" 2> "$build/peer.err" || status=1
    tee -a "$out" < "$build/peer.log"
    [ $status = 0 ] || tail -n 20 "$build/peer.err"
  done
  return $status
}

: > "$out"
say "moe $commit, $(date -u +%F), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | head -n 1), $(nvcc --version 2> /dev/null | grep -om1 'V[0-9][0-9.]*' || echo 'no nvcc')"
passes=0 failures=0
for stage in "${chosen[@]}"; do
  SECONDS=0
  export -f "stage_$stage" sanitize say programs
  export build out prefix jobs
  if timeout "$limit" bash -uo pipefail -c "stage_$stage" > "$build/$stage.log" 2>&1; then
    say "PASS $stage $SECONDS s"
    passes=$((passes + 1))
  else
    say "FAIL $stage $SECONDS s; the end of $build/$stage.log:"
    tail -n 40 "$build/$stage.log" | tee -a "$out"
    failures=$((failures + 1))
  fi
done
say "$passes passed, $failures failed"
[ "$failures" = 0 ]
