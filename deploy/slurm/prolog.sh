#!/bin/bash
# Prolog= of slurm.conf, with PrologFlags=Alloc: runs as root on every node of a job before its tasks, and starts this
# node's daemon for the job's user. A second job of that user finds it running and only leaves its mark.
#
# It never fails: Slurm drains a node whose prolog fails, and a run without snapshots is better than no run.
trap 'exit 0' EXIT
export PATH="${PATH:-/usr/sbin:/usr/bin:/sbin:/bin}"

uid=${SLURM_JOB_UID:-} job=${SLURM_JOB_ID:-}
marks=${SNAPSHOTD_MARKS:-/run/snapshotd/jobs}/$uid

say() { logger -t snapshotd -- "prolog of job $job, user $uid: $*"; }

if [[ ! $uid =~ ^[0-9]+$ || ! $job =~ ^[0-9]+$ ]]; then
    say "SLURM_JOB_UID or SLURM_JOB_ID is no number, so no daemon was started and the job trains unprotected"
    exit
fi
if ! mkdir -p "$marks"; then
    say "$marks cannot be made, so no daemon was started and the job trains unprotected"
    exit
fi
{
    flock -w 60 9 || say "the lock $marks.lock is taken for a minute already; going on without it"
    touch "$marks/$job"
    systemctl start "snapshotd@$uid.service" ||
        say "snapshotd@$uid.service did not start, so the job trains unprotected; see journalctl -u snapshotd@$uid"
} 9>"$marks.lock"
