#!/usr/bin/env bash
# A real Slurm of one node for tests: Debian's packages unpacked into a folder, nothing installed, no root, no systemd, no
# cgroups, loopback only, two fake GPUs.
#
#   tests/slurm/onenode.sh start DIR         fetch, unpack, start; DIR/bin holds squeue, sbatch, scancel, ...
#   PATH=DIR/bin:$PATH snakemake --cores all --profile slurm ...
#   tests/slurm/onenode.sh stop DIR          cancel all jobs, end the daemons
#
# The node says that it has 64 GB and SLURM_TEST_CPUS cores (default: the machine's); nothing holds jobs to what they asked.
set -euo pipefail

[ $# = 2 ] || { sed -n '2,9s/^# \?//p' "$0"; exit 2; }
mkdir -p "$2"
D=$(cd "$2" && pwd)
LIB="$D/root/usr/lib/$(uname -m)-linux-gnu"

fetch() { # Packages of Slurm and munge, with the libraries that this machine lacks, into $D/root.
  mkdir -p "$D"/apt/{lists,archives}/partial
  local apt=(apt-get -qq -o "Dir::State::Lists=$D/apt/lists" -o "Dir::Cache=$D/apt" -o Debug::NoLocking=1
    -o "APT::Sandbox::User=$(id -un)")
  "${apt[@]}" update
  "${apt[@]}" install --download-only --reinstall --no-install-recommends --yes slurmctld slurmd slurm-client \
    slurm-wlm-basic-plugins munge libmunge2 >/dev/null
  for package in "$D"/apt/archives/*.deb; do dpkg -x "$package" "$D/root"; done
  # Debian's alternatives drop the suffix, and a daemon that is called otherwise does not know that it is one.
  for daemon in "$D"/root/usr/sbin/*-wlm; do mv "$daemon" "${daemon%-wlm}"; done
  rm -r "$D/apt"
}

wrap() { # Commands that find their libraries and their cluster in any environment, in $D/bin.
  mkdir -p "$D/bin"
  for program in "$D"/root/usr/bin/* "$D"/root/usr/sbin/*; do
    printf '#!/bin/sh\nexport SLURM_CONF="%s" LD_LIBRARY_PATH="%s:%s/slurm-wlm"\nexec "%s" "$@"\n' \
      "$D/slurm.conf" "$LIB" "$LIB" "$program" >"$D/bin/${program##*/}"
  done
  chmod +x "$D"/bin/*
}

configure() {
  local host ports
  host=$(hostname -s)
  read -ra ports < <(python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "12"]
print(*(x.getsockname()[1] for x in s))')
  mkdir -p "$D"/{state,spool,log}
  (umask 077; head -c 128 /dev/urandom >"$D/munge.key")
  # Slurm takes only character devices for GPUs; any will do.
  printf 'AutoDetect=off\nName=gpu Type=fake File=/dev/null\nName=gpu Type=fake File=/dev/zero\n' >"$D/gres.conf"
  cat >"$D/slurm.conf" <<END
ClusterName=onenode
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
PluginDir=$LIB/slurm-wlm
AuthType=auth/munge
AuthInfo=socket=$D/munge.socket
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobs.log
ReturnToService=2
KillWait=20
MinJobAge=7200
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=${SLURM_TEST_CPUS:-$(getconf _NPROCESSORS_ONLN)} RealMemory=64000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=1-00:00:00 State=UP
END
}

start() {
  [ -d "$D/root" ] || fetch
  configure
  wrap
  "$D/bin/munged" --force --key-file="$D/munge.key" --socket="$D/munge.socket" --pid-file="$D/munged.pid" \
    --seed-file="$D/munged.seed" --log-file="$D/log/munged.log"
  "$D/bin/slurmctld"
  "$D/bin/slurmd" -d "$D/bin/slurmstepd"
  for _ in $(seq 60); do
    [ "$("$D/bin/sinfo" -h -o %T 2>/dev/null)" != idle ] || { "$D/bin/sinfo" -N -o '%N %T %c %m %G'; return; }
    sleep 0.5
  done
  tail -n 20 "$D"/log/*.log >&2
  echo "the node never became idle" >&2
  exit 1
}

stop() {
  "$D/bin/scancel" --user="$(id -un)" || true
  for daemon in slurmd slurmctld munged; do
    [ -s "$D/$daemon.pid" ] || continue
    local pid
    pid=$(cat "$D/$daemon.pid")
    kill "$pid" || true
    for _ in $(seq 120); do kill -0 "$pid" 2>/dev/null || break; sleep 0.25; done
  done
}

"$1"
