#!/usr/bin/env bash
# up.sh DIR [NODES] - start an emulated SLURM cluster of NODES nodes on this one machine.
#
#   . DIR/env.sh            afterwards: SLURM_CONF, PATH (emu-node first), EMU_*
#   down.sh DIR             ends exactly what was started here
#
# Settings (environment):
#   EMU_MODE    ns | net | plain   ns (default when root and namespaces work): every node is its own
#                               mount+UTS+PID namespace: own hostname, own /etc/hosts, and killing its
#                               init kills the whole "machine".  net: ns, and every node has its own
#                               network namespace and address on a bridge of this host (emu-node cut/join
#                               takes it off the net).  plain: no namespaces, no root needed.
#   EMU_CPUS    CPUs each node claims (default 16; may exceed the real ones)
#   EMU_GPUS    fake GPUs per node (gres/gpu, default 2; 0 = none)
#   EMU_AUTH    munge | none    (default munge when munged is installed)
#   EMU_DBD     0 | 1           1 = DIR gets a real slurmdbd + mariadbd, so the real sacct works
#   EMU_TIMEOUT SlurmdTimeout in seconds (default 15): how soon a dead node is noticed
#   EMU_MIN_JOB_AGE             seconds after which squeue forgets an ended job (default a day)
#   EMU_REQUEUE_WAIT            seconds a requeued job is held back (default 5; SLURM's own is 120)
#   EMU_WAIT    seconds to wait for idle nodes (default 30)
set -euo pipefail
DIR=${1:?usage: up.sh DIR [NODES]}; N=${2:-3}
mkdir -p "$DIR"; DIR=$(cd "$DIR" && pwd -P)
# unix sockets (munged's, slurmstepd's spool/NODE/NODE_JOB.STEP) must stay below 108 characters
[ ${#DIR} -le 64 ] || { echo "up.sh: the path $DIR is longer than 64 characters: too long for unix sockets" >&2; exit 2; }
CPUS=${EMU_CPUS:-16} GPUS=${EMU_GPUS:-2} TMO=${EMU_TIMEOUT:-15} RQ=${EMU_REQUEUE_WAIT:-5}
DBD=${EMU_DBD:-0} WAIT=${EMU_WAIT:-30} AGE=${EMU_MIN_JOB_AGE:-86400}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
PATH=$PATH:/usr/sbin:/sbin
for c in slurmctld slurmd sinfo srun sbatch scontrol; do
  command -v $c >/dev/null || { echo "up.sh: $c is missing: apt-get install -y --no-install-recommends slurm-wlm munge" >&2; exit 3; }
done
[ -e "$DIR/pids" ] && { echo "up.sh: $DIR/pids exists: a cluster is (or was) up there; run down.sh $DIR first" >&2; exit 4; }

MODE=${EMU_MODE:-}
if [ -z "$MODE" ]; then
  if [ "$(id -u)" = 0 ] && unshare --mount --uts --pid --fork --kill-child --mount-proc true 2>/dev/null; then MODE=ns; else MODE=plain; fi
fi
AUTH=${EMU_AUTH:-}; [ -n "$AUTH" ] || { command -v munged >/dev/null && AUTH=munge || AUTH=none; }
ME=$(id -un)

# ---------------------------------------------------------------- names, addresses, ports
# plain mode has no /etc/hosts of its own, so the node *names* must resolve by themselves
# (MASTER_ADDR = first name of the node list): loopback addresses do.
case $MODE in ns|net) PFX=n ;; plain) PFX=127.0.1. ;; *) echo "up.sh: EMU_MODE=$MODE?" >&2; exit 2 ;; esac
BASE=$(python3 - "$N" <<'PY'
import random, socket, sys
n = int(sys.argv[1]) + 3
r = random.SystemRandom()
for _ in range(200):                       # below the ephemeral range (32768+)
    b = r.randrange(12000, 19900); ok = []
    try:
        for p in range(b, b + n):
            s = socket.socket(); s.bind(("0.0.0.0", p)); ok.append(s)
    except OSError:
        continue
    finally:
        for s in ok: s.close()
    print(b); break
else:
    sys.exit("no free port range")
PY
)
CTLADDR=127.0.0.1 ADDR=127.0.0.1 NET= BR=
if [ "$MODE" = net ]; then
  # 198.18.0.0/15 (benchmarking range); the unreachable route keeps packets for it off the real interfaces
  # should the bridge be gone; nodes have no default route at all
  NET=198.18.$((BASE % 250)); BR=emu$BASE; CTLADDR=$NET.254 ADDR="$NET.[1-$N]"
  [ "$N" -le 250 ] && ! ip -4 addr | grep -q " $NET\." || { echo "up.sh: net $NET.0/24 is taken" >&2; exit 5; }
fi
P_CTL=$BASE P_DBD=$((BASE+1)) P_SQL=$((BASE+2)) P_N1=$((BASE+3))

rm -rf "$DIR"/{state,spool,log,run,dev,bin,mysql,slurmdbd.conf,gres.conf,hosts}
mkdir -p "$DIR"/{state,spool,log,run,dev,bin}
chmod 755 "$DIR" "$DIR/run"

# every start is recorded as "name pid starttime": down.sh ends a pid only while both still agree
rec() { echo "$1 $2 $(awk '{sub(/^.*\) /,""); print $20}' "/proc/$2/stat")" >> "$DIR/pids"; }
# (setsid, so that a Ctrl-C or the end of the caller's shell does not reach the daemons)
bg() { local name=$1; shift; setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 & rec "$name" $!; }
die() { echo "up.sh: $*" >&2; tail -n 5 "$DIR"/log/*.out "$DIR"/log/*.log >&2 2>/dev/null || true; "$HERE/down.sh" "$DIR" >&2 || true; exit 1; }
: > "$DIR/pids"

# ---------------------------------------------------------------- authentication
if [ "$AUTH" = munge ]; then
  [ -s "$DIR/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$DIR/munge.key")
  bg munged munged --foreground --force --num-threads=2 --key-file="$DIR/munge.key" --socket="$DIR/run/munge.sock" \
     --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munge.seed"
  AUTHLINES="AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=$RQ"
else
  AUTHLINES="AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=$RQ"
fi

# ---------------------------------------------------------------- accounting (optional)
if [ "$DBD" = 1 ]; then
  ACCT="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$P_DBD"
  [ "$AUTH" = munge ] && ACCT="$ACCT
AccountingStoragePass=$DIR/run/munge.sock"
else
  ACCT="AccountingStorageType=accounting_storage/none"
fi

GRES=""; GRESNODE=""
if [ "$GPUS" -gt 0 ]; then
  # gres.conf wants character or block devices with a number at the end: copies of /dev/null (root), else
  # some that exist (they are never opened); "Count=" without File= is refused (node INVAL, "0 < 2")
  r=$([ "$GPUS" -gt 1 ] && echo "[0-$((GPUS-1))]" || echo 0) f=""
  for ((i=0;i<GPUS;i++)); do mknod "$DIR/dev/gpu$i" c 1 3 2>/dev/null || break; done
  for d in "$DIR/dev/gpu" /dev/tty /dev/ttyS /dev/loop; do
    [ -e "$d$((GPUS-1))" ] && [ -e "${d}0" ] && { f=$d$r; break; }; done
  if [ -n "$f" ]; then
    GRES="GresTypes=gpu"; GRESNODE="Gres=gpu:$GPUS"
    printf 'AutoDetect=off\nName=gpu File=%s\n' "$f" > "$DIR/gres.conf"
  else echo "up.sh: no device files to play GPUs: nodes have none" >&2; fi
fi
cat > "$DIR/slurm.conf" <<E
ClusterName=emu
SlurmctldHost=localhost($CTLADDR)
SlurmctldPort=$P_CTL
SlurmUser=$ME
SlurmdUser=$ME
$AUTHLINES
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
PlugStackConfig=/dev/null
MailProg=/bin/true
# one machine plays many: no cgroups, no binding, claimed hardware is believed
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# quick reactions
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5,bf_window=1440
SlurmctldTimeout=30
SlurmdTimeout=$TMO
KillWait=5
UnkillableStepTimeout=30
MinJobAge=$AGE
MaxArraySize=10001
ReturnToService=2
RebootProgram=/bin/true
# preemption: jobs of "high" push out jobs of "low", which get --signal's signal, GraceTime, then a requeue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
$GRES
$ACCT
NodeName=${PFX}[1-$N] NodeHostname=localhost NodeAddr=$ADDR Port=[$P_N1-$((P_N1+N-1))] CPUs=$CPUS RealMemory=64000 $GRESNODE State=UNKNOWN
PartitionName=all  Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=short Nodes=ALL MaxTime=30 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=low  Nodes=ALL MaxTime=INFINITE PriorityTier=1  PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF State=UP
E
sed -i 's/  *$//; /^$/d' "$DIR/slurm.conf"

# ---------------------------------------------------------------- what callers source
cat > "$DIR/env.sh" <<E
export SLURM_CONF=$DIR/slurm.conf
export EMU_DIR=$DIR EMU_MODE=$MODE EMU_NODES=$N EMU_PREFIX=$PFX EMU_NET=$NET EMU_BR=$BR
$([ "$MODE" = net ] && I=eth0 || I=lo; echo "export GLOO_SOCKET_IFNAME=$I NCCL_SOCKET_IFNAME=$I TP_SOCKET_IFNAME=$I")
case ":\$PATH:" in *":$DIR/bin:"*) ;; *) export PATH=$DIR/bin:\$PATH:/usr/sbin ;; esac
E
. "$DIR/env.sh"

wait_port() { for _ in $(seq 100); do (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return 0; sleep 0.1; done; return 1; }
if [ "$AUTH" = munge ]; then
  for _ in $(seq 50); do [ -S "$DIR/run/munge.sock" ] && break; sleep 0.05; done
  [ -S "$DIR/run/munge.sock" ] || die "munged did not start"
fi
if [ "$DBD" = 1 ]; then
  command -v slurmdbd >/dev/null && command -v mariadbd >/dev/null || die "EMU_DBD=1 needs: apt-get install -y --no-install-recommends slurmdbd mariadb-server"
  mkdir -p "$DIR/mysql"
  mariadb-install-db --no-defaults --datadir="$DIR/mysql" --auth-root-authentication-method=normal --skip-test-db --innodb-log-file-size=8M --user="$ME" >"$DIR/log/mysql_install.out" 2>&1 || die "mariadb-install-db"
  bg mariadbd mariadbd --no-defaults --datadir="$DIR/mysql" --user="$ME" --bind-address=127.0.0.1 --port=$P_SQL \
     --socket="$DIR/run/mysql.sock" --pid-file="$DIR/run/mysql.pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=8M --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0
  for _ in $(seq 100); do mariadb --no-defaults -uroot -S "$DIR/run/mysql.sock" -e "create database if not exists slurm_acct; create user if not exists slurm@'127.0.0.1' identified by 'emu'; create user if not exists slurm@localhost identified by 'emu'; grant all on slurm_acct.* to slurm@'127.0.0.1'; grant all on slurm_acct.* to slurm@localhost" 2>/dev/null && break; sleep 0.2; done
  (umask 077; cat > "$DIR/slurmdbd.conf" <<E
$(echo "$AUTHLINES" | grep -v -e '^CredType' | sed 's/,cred_expire.*//; /^AuthInfo=cred_expire/d')
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$P_DBD
SlurmUser=$ME
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$P_SQL
StorageUser=slurm
StoragePass=emu
StorageLoc=slurm_acct
E
  )
  # slurmdbd reads slurmdbd.conf from the folder of SLURM_CONF
  bg slurmdbd slurmdbd -D
  wait_port $P_DBD || die "slurmdbd did not start"
fi

# ---------------------------------------------------------------- controller and nodes
if [ "$MODE" = net ]; then
  ip link add "$BR" type bridge forward_delay 0 && ip addr add "$NET.254/24" dev "$BR" && ip link set "$BR" up || die "bridge"
  ip route add unreachable "$NET.0/24" metric 4000 || true
fi
bg slurmctld slurmctld -D
{ echo "127.0.0.1 localhost"; for ((i=1;i<=N;i++)); do echo "${NET:-127.0.0}.$([ -n "$NET" ] && echo $i || echo 1) ${PFX}$i"; done; } > "$DIR/hosts"
cat > "$DIR/bin/emu-node" <<'E'
#!/usr/bin/env bash
# emu-node start NODE   boot the "machine"      (ns: namespaces + slurmd; plain: slurmd)
# emu-node kill  NODE   power cut               (ns: everything on it dies; plain: only slurmd)
# emu-node slurmd-kill NODE   only the daemon dies, its steps live on
# emu-node slurmd-start NODE  start the daemon again on a "machine" that still runs
# emu-node pause NODE / resume NODE   the whole machine hangs (SIGSTOP to all on it; ns only): peers see silence, no closed socket
# emu-node cut NODE / join NODE    its network cable (net only)
# emu-node pid   NODE   host pid of its init (ns) or slurmd (plain)
set -euo pipefail
. "$(dirname "$0")/../env.sh"; cmd=$1 node=$2
rec() { echo "$1 $2 $(awk '{sub(/^.*\) /,""); print $20}' "/proc/$2/stat")" >> "$EMU_DIR/pids"; }
last() { awk -v n="$1" '$1==n{p=$2; s=$3} END{if(p) print p, s}' "$EMU_DIR/pids"; }
live() { [ -n "${1:-}" ] && [ "$(awk '{sub(/^.*\) /,""); print $20}' "/proc/$1/stat" 2>/dev/null)" = "$2" ] && [ "$(awk '{sub(/^.*\) /,""); print $1}' "/proc/$1/stat")" != Z ]; }
case $cmd in
start)
  mkdir -p "$EMU_DIR/spool/$node"
  if [ "$EMU_MODE" != plain ]; then
    rm -f "$EMU_DIR/run/init.$node"
    opt= ; [ "$EMU_MODE" = net ] && opt=--net
    setsid unshare --mount --uts --pid $opt --fork --kill-child --mount-proc bash -c '
      if [ -n "$3" ]; then ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done; fi
      hostname "$1"; mount --bind "$2/hosts" /etc/hosts
      up() { slurmd -D -N "$1" & d=$!; }
      trap "up $1" USR1; trap "kill -KILL \$d" USR2; up "$1"; sleep infinity & : > "$2/run/init.$1"
      while :; do wait || true; done' emu-node-init "$node" "$EMU_DIR" "$EMU_NET" </dev/null >>"$EMU_DIR/log/slurmd.$node.out" 2>&1 &
    u=$!
    if [ "$EMU_MODE" = net ]; then
      i=${node#"$EMU_PREFIX"}; v=$EMU_BR.$i; ip link del "$v" 2>/dev/null || true
      until c=$(cat "/proc/$u/task/$u/children") && c=${c%% *} && [ -n "$c" ]; do sleep 0.02; done
      ip link add "$v" type veth peer name "p$v"; ip link set "$v" master "$EMU_BR" up
      ip link set "p$v" netns "$c" name eth0
      nsenter -t "$c" -n sh -c "ip addr add $EMU_NET.$i/24 dev eth0; ip link set eth0 up"
    fi
    for _ in $(seq 100); do [ -e "$EMU_DIR/run/init.$node" ] && break; sleep 0.02; done
    c=$(cat "/proc/$u/task/$u/children"); c=${c%% *}
    rec "unshare.$node" $u; rec "node.$node" "$c"
  else
    setsid slurmd -D -N "$node" </dev/null >>"$EMU_DIR/log/slurmd.$node.out" 2>&1 & rec "node.$node" $!
  fi ;;
kill) set -- $(last "node.$node"); live "$@" && kill -KILL "$1" ;;
slurmd-kill)                                       # by its init, in the node's own pid namespace (nsenter -p would never reap it)
  set -- $(last "node.$node"); live "$@"
  if [ "$EMU_MODE" != plain ]; then kill -USR2 "$1"; else kill -KILL "$1"; fi ;;
slurmd-start)
  if [ "$EMU_MODE" != plain ]; then set -- $(last "node.$node"); live "$@"; kill -USR1 "$1"; else "$0" start "$node"; fi ;;
pause|resume)
  [ "$EMU_MODE" != plain ] || { echo "emu-node $cmd: not in mode plain" >&2; exit 2; }
  set -- $(last "node.$node"); ns=$(readlink "/proc/$1/ns/pid"); [ $cmd = pause ] && s=STOP || s=CONT
  for q in /proc/[0-9]*; do [ "${q#/proc/}" != "$1" ] && [ "$(readlink "$q/ns/pid" 2>/dev/null)" = "$ns" ] && kill -$s "${q#/proc/}" 2>/dev/null; done; : ;;
cut|join)
  [ "$EMU_MODE" = net ] || { echo "emu-node $cmd: only in mode net" >&2; exit 2; }
  ip link set "$EMU_BR.${node#"$EMU_PREFIX"}" "$([ $cmd = cut ] && echo down || echo up)" ;;
pid) set -- $(last "node.$node"); live "$@" && echo "$1" ;;
*) sed -n 2,9p "$0"; exit 2 ;;
esac
E
chmod +x "$DIR/bin/emu-node"
for ((i=1;i<=N;i++)); do "$DIR/bin/emu-node" start "$PFX$i" || die "node $PFX$i"; done

t0=$SECONDS
until [ "$(sinfo -h -N -p all -o %T 2>/dev/null | grep -cx idle)" = "$N" ]; do
  while read -r n p _; do [ -e "/proc/$p" ] && [ "$(awk '{sub(/^.*\) /,""); print $1}' "/proc/$p/stat")" != Z ] || die "$n (pid $p) ended while starting"; done < "$DIR/pids"
  [ $((SECONDS-t0)) -ge "$WAIT" ] && die "nodes not idle after $WAIT s: $(sinfo -N -l 2>&1)"
  sleep 0.1
done
echo "up: $N nodes idle, mode $MODE, auth $AUTH, accounting $([ "$DBD" = 1 ] && echo slurmdbd || echo none); next: . $DIR/env.sh"
