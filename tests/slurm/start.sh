#!/usr/bin/env bash
# Start a Slurm of one node on loopback, without systemd; everything it writes is below FOLDER. For root, on Debian:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#   tests/slurm/start.sh FOLDER    ...    tests/slurm/stop.sh FOLDER
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
host=$(hostname -s)
mkdir -p "$folder"/{munge,state,spool,log}
chmod 0755 "$folder" "$folder/munge"

dd if=/dev/urandom of="$folder/munge.key" bs=64 count=1 status=none
chmod 0600 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/log/munged" --seed-file="$folder/munge/seed"

cat >"$folder/slurm.conf" <<CONF
ClusterName=memstudy
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=2
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(free -m | awk '/^Mem/ {print int($2 * 0.9)}') State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /etc/slurm
[ -e /etc/slurm/slurm.conf ] && [ ! -L /etc/slurm/slurm.conf ] && {
    echo "error: /etc/slurm/slurm.conf is there: this machine has a Slurm of its own" >&2
    exit 1
}
ln -sfn "$folder/slurm.conf" /etc/slurm/slurm.conf

slurmctld
slurmd
for _ in $(seq 50); do
    sinfo --noheader --format=%T 2>/dev/null | grep -q idle && exit 0
    sleep 0.2
done
echo "error: the node did not come up; see $folder/log" >&2
exit 1
