# shellcheck shell=bash
# What the suites have in common; each sources it first, with its own arguments. A suite is a program that tests
# the file system at a directory, wherever that is: on this machine, on /dev/fuse, or in a guest.
#
#   SUITE DIRECTORY    DIRECTORY is empty; what the suite leaves in it does not matter
#
# Environment, set by tests/suite:
#   SUITE_EFFORT       quick (seconds), normal, or full (as long as it takes)
#   SUITE_PLACE        door, guest, or host: what DIRECTORY is on
#   SUITE_INPUT        a directory with what was prepared for suites
#   SUITE_MAY_SKIP     names of tests that the file system below DIRECTORY does not pass either
# and by hand, for fsx: SUITE_OPERATIONS, how many, and SUITE_SEED.
#
# The last line that a suite prints is "suite NAME: N passed, N failed, N skipped"; it fails when one has failed.
set -u
export LC_ALL=C RUST_BACKTRACE=0
suite=$(basename "$0")
directory=${1:?"Usage: $0 DIRECTORY"}
directory=$(cd "$directory" && pwd -P) || exit 1
effort=${SUITE_EFFORT:-quick}
place=${SUITE_PLACE:-host}
export effort place

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT

passed=0
failed=0
skipped=0

pass() { passed=$((passed + 1)); }

# fail NAME [LOG]: with the end of the log.
fail() {
    failed=$((failed + 1))
    echo "$suite: FAILED: $1"
    if [[ ${2:-} ]]; then tail -n 30 "$2" | cut -c -240 | sed 's/^/    /'; fi
}

# skip NAME REASON: a failure unless SUITE_MAY_SKIP has the name.
skip() {
    case " ${SUITE_MAY_SKIP:-} " in
        *" $1 "*) ;;
        *)
            fail "$1 was skipped: $2"
            return
            ;;
    esac
    skipped=$((skipped + 1))
    echo "$suite: skipped: $1: $2"
}

# check NAME COMMAND…: passes when the command does.
check() {
    local name=$1
    shift
    if "$@" >"$scratch/log" 2>&1; then pass; else fail "$name (status $?)" "$scratch/log"; fi
}

# by_effort QUICK NORMAL FULL
by_effort() {
    case $effort in
        quick) echo "$1" ;;
        full) echo "$3" ;;
        *) echo "$2" ;;
    esac
}

closing() {
    echo "suite $suite: $passed passed, $failed failed, $skipped skipped"
    [[ $failed == 0 && $passed -gt 0 ]]
    exit
}
