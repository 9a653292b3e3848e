#!/bin/bash
# TaskProlog= of slurm.conf: runs as the job's user before each task; what it prints becomes the task's environment. It
# tells trainers where this node's daemon for their user is, unless the job names one itself.
[[ -n ${SNAPSHOTD_SOCKET:-} ]] || echo "export SNAPSHOTD_SOCKET=/run/snapshotd/$(id -u)/snapshotd.sock"
