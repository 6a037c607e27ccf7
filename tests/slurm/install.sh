#!/usr/bin/env bash
# install.sh - SLURM as Debian has it, for the tests on a real one: no service is started. The last
# three packages are for accounting (EMU_DBD=1).
set -euo pipefail
PATH=$PATH:/usr/sbin
missing=
for command in slurmctld munged slurmdbd mariadbd; do
  command -v $command >/dev/null || missing=$command
done
if [ -z "$missing" ]; then
  echo "SLURM is here: $(slurmctld -V)"
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "install.sh: needs root and apt-get; without SLURM its tests are skipped" >&2
  exit 3
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
  slurm-wlm munge slurmdbd mariadb-server-core mariadb-client-core >/dev/null
echo "installed: $(slurmctld -V)"
