#!/bin/bash
# Epilog= of slurm.conf: runs as root on every node when a job has ended there, and ends the daemon of the job's user
# unless it is still needed: by another job of that user on this node, or because it keeps something.
#
# It keeps something where a job was killed, preempted or requeued before its ranks called close(). Then the daemon stays:
# the requeued job (same id, so same name) finds its snapshots, peers can read them, and when nobody comes back `lease`
# frees the memory, which only a running daemon does. The next epilog of this user then ends it.
#
# It never fails: Slurm drains a node whose epilog fails.
trap 'exit 0' EXIT
export PATH="${PATH:-/usr/sbin:/usr/bin:/sbin:/bin}"

uid=${SLURM_JOB_UID:-} job=${SLURM_JOB_ID:-}
marks=${SNAPSHOTD_MARKS:-/run/snapshotd/jobs}/$uid
snapshotd=${SNAPSHOTD:-/opt/snapshotd/bin/snapshotd}

say() { logger -t snapshotd -- "epilog of job $job, user $uid: $*"; }

kept_bytes() {
    timeout 20 "$snapshotd" status --json --socket "/run/snapshotd/$uid/snapshotd.sock" |
        sed -n 's/^ *"arenas_bytes": \([0-9]*\).*/\1/p'
}

if [[ ! $uid =~ ^[0-9]+$ || ! $job =~ ^[0-9]+$ || ! -d $marks ]]; then
    exit # no prolog was here
fi
{
    flock -w 60 9 || say "the lock $marks.lock is taken for a minute already; going on without it"
    rm -f "$marks/$job"
    if [[ -n $(ls -A "$marks") ]]; then
        exit # another job of this user is here
    fi
    case $(kept_bytes) in
        0) systemctl stop "snapshotd@$uid.service" || say "snapshotd@$uid.service did not stop" ;;
        '') say "the daemon does not answer; it was left as it is" ;;
        *) say "the daemon keeps snapshots of a job that was not over; it frees them when the lease ends" ;;
    esac
} 9>"$marks.lock"
