#!/bin/sh
# Runs one fault scenario under mpirun with 3 ranks and checks what each rank saw.
# Usage: mpi_faults.sh MPIRUN PROGRAM SCENARIO
set -u
mpirun=$1 program=$2 scenario=$3
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

fail() {
  echo "$scenario: $1" >&2
  tail -n +1 "$dir"/* >&2
  exit 1
}
# expect RANK PATTERN: a line of that rank matches the extended regular expression.
expect() { grep -Eq "$2" "$dir/rank-$1" || fail "rank $1 has no line matching: $2"; }

begin=$(date +%s)
timeout -k 5 40 "$mpirun" -np 3 --oversubscribe --mca odls_base_sigkill_timeout 3 "$program" "$scenario" "$dir" \
  >"$dir/output" 2>&1
status=$?
seconds=$(($(date +%s) - begin))
[ "$seconds" -le 20 ] || fail "took $seconds s"
[ "$status" -ne 0 ] || fail "mpirun succeeded"

case $scenario in
missing)
  [ "$status" -eq 3 ] || fail "exit status $status, not 3"
  expect 0 '^DEADLINE_EXCEEDED: .*for rank 2'
  expect 0 '^later: FAILED_PRECONDITION: .*DEADLINE_EXCEEDED'
  expect 1 '^DEADLINE_EXCEEDED: '
  ;;
abort)
  [ "$status" -eq 3 ] || fail "exit status $status, not 3"
  expect 0 '^DATA_LOSS: rank 2: first reason after [0-9]{1,4} ms'
  expect 1 '^DATA_LOSS: rank 2: first reason'
  expect 2 '^DATA_LOSS: first reason'
  expect 2 '^later: FAILED_PRECONDITION: .*first reason'
  ;;
mismatch)
  [ "$status" -eq 3 ] || fail "exit status $status, not 3"
  expect 0 'INTERNAL: .*mismatched calls: rank . is in call 1, (Barrier|Broadcast) .*sent call 1, (Barrier|Broadcast)'
  ;;
kill)
  expect 0 '^(UNAVAILABLE|DEADLINE_EXCEEDED): .* after [0-9]{1,4} ms'
  expect 1 '^(UNAVAILABLE|DEADLINE_EXCEEDED): .* after [0-9]{1,4} ms'
  ;;
watchdog-kill)
  # A closed connection tells within milliseconds; the fault comes 300 ms after the start.
  expect 0 '^UNAVAILABLE: rank 2 is lost: .* after (3[0-9][0-9]|4[0-9][0-9]|5[0-9][0-9]) ms'
  expect 1 '^UNAVAILABLE: rank 2 is lost: rank 0 says so'
  ;;
watchdog-stop)
  expect 0 '^UNAVAILABLE: rank 2 is lost: silent for more than 2000 ms after [234][0-9]{3} ms'
  expect 1 '^UNAVAILABLE: rank 2 is lost: rank 0 says so'
  ;;
watchdog-root)
  expect 1 '^UNAVAILABLE: rank 0 is lost: '
  expect 2 '^UNAVAILABLE: rank 0 is lost: '
  ;;
*)
  fail "unknown scenario"
  ;;
esac
