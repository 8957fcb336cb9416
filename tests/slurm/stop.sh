#!/usr/bin/env bash
# Stop what start.sh FOLDER started.
set -uo pipefail
folder=$(cd "$1" && pwd)
scancel --user="$(id -un)" 2>/dev/null
scontrol shutdown 2>/dev/null
for _ in $(seq 50); do
    [ -e "$folder/slurmctld.pid" ] || [ -e "$folder/slurmd.pid" ] || break
    sleep 0.2
done
[ -e "$folder/munge/pid" ] && kill "$(cat "$folder/munge/pid")"
[ "$(readlink /etc/slurm/slurm.conf)" = "$folder/slurm.conf" ] && rm /etc/slurm/slurm.conf
exit 0
