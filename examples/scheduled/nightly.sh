#!/bin/sh
# The orders of one day, on a cluster of the Dask Gateway: for cron, and safe to be run again at any time.
#
#   nightly.sh [YYYY-MM-DD]     the day; the day before today (UTC) when left out
#
# INPUT and OUTPUT are folders or URLs with a folder for each day; STORE is where the job directories lie.
# Ends with the exit code of cortex-dask: 0 all is done, 3 some batches failed for good, 2 a mistake in what was
# given, 124 timed out, 130 stopped, 1 anything else, after TRIES attempts.
set -u

here=$(cd "$(dirname "$0")" && pwd) || exit 2
: "${INPUT:?set INPUT to the folder with the input}" "${OUTPUT:?set OUTPUT to the folder for the output}"
day=${1:-$(python3 -c 'from datetime import UTC, datetime, timedelta; print((datetime.now(UTC) - timedelta(1)).date())')}
export DASK_CORTEX_DASK__STORE="${STORE:?set STORE to the folder for the jobs}"

# The job id is the day's. Whoever submits it first begins it; a second one, started by hand or by cron while the first
# is at it, waits for the same job; and a later one finds it complete, or goes on where it ended. So nothing runs twice,
# and no lock is needed.
try=1
while :; do
    cortex-dask submit "${PROJECT:-$here/project}" \
        --input "$INPUT/$day" --output "$OUTPUT/$day" \
        --job-id "nightly-$day" --cluster "${CLUSTER:-gateway}" --timeout "${TIMEOUT:-14400}" --wait
    code=$?
    # Only what may pass by itself is tried again: a gateway that is being restarted, a scheduler that was lost.
    if [ "$code" -ne 1 ] || [ "$try" -ge "${TRIES:-6}" ]; then
        exit "$code"
    fi
    try=$((try + 1))
    echo "nightly-$day: exit code $code; attempt $try in ${PAUSE:-300} s" >&2
    sleep "${PAUSE:-300}"
done
