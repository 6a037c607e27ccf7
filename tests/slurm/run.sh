#!/usr/bin/env bash
# run.sh NODES COMMAND... - run a command as on a login node of an emulated cluster, then end that.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
nodes=$1
shift
folder=$(mktemp -d /tmp/emuXXXXXX)
trap '"$here/down.sh" "$folder"; rm -rf "$folder"' EXIT
"$here/up.sh" "$folder" "$nodes"
. "$folder/env.sh"
"$@"
