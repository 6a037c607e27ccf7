# Steps of a batch script before its ranks and after them, sourced by it on the first node. Plain
# bash, since Python may be in a container that this script is not in.
#
#   begin FOLDER MAX_STARTS FINAL_EXIT_CODES PYTHON [SRUN_OPTION...]
#   finish EXIT_CODE

log() { echo "$(date +%FT%T.%3N) job $job: $*"; }

# The name of the newest checkpoint, or "none".
newest() { { echo none; ls "$run/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort -V; } | tail -n 1; }

begin() {
  folder=$1 max_starts=$2 final=$3 python=$4
  shift 4
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job=${job:-$SLURM_JOB_ID}
  run=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "$folder/runs")
  at=$(newest)
  log "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST; newest checkpoint: $at"
  count_start
  choose_port
  check_nodes "$@"
  [ -e "$folder/$job.cancelled" ] && finish 75
  log "nodes are ready, ranks meet at $MASTER_ADDR:$MASTER_PORT"
}

# A run that is started again and again without a new checkpoint is stopped, whatever it ends of.
count_start() {
  local last= count=0
  [ -e "$folder/$job.starts" ] && read -r last count < "$folder/$job.starts"
  [ "$last" = "$at" ] && count=$((count + 1)) || count=1
  echo "$at $count" > "$folder/$job.starts"
  [ "$count" -le "$max_starts" ] && return
  log "started $max_starts times without coming to another checkpoint (the newest one: $at;" \
    "train.max_stalled_starts=$max_starts); look at its logs, then: python -m launch.slurm resume $run"
  exit 93
}

# Rank 0 is on this node, at MASTER_ADDR; ports from 15000 to 30000 are not given out by systems themselves.
choose_port() {
  local port
  while port=$((15000 + RANDOM % 15000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  export MASTER_PORT=$port
}

# Every node must see the folder of the run, and have the Python that it is to be run by.
check_nodes() {
  local check='
    node=$SLURMD_NODENAME
    if ! [ -e "$1/token" ]; then
      echo "node $node: $1 is not there; put run_dir on a file system that all nodes share" >&2
      exit 64
    fi
    packages="torch submitit dist_contrastive"
    find="import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"
    if ! eval "$2 -c \"\$find\" $packages"; then
      echo "node $node: \"$2\" is no Python that has $packages; name one in the profile (python," \
        "container, setup), on a file system that all nodes share" >&2
      exit 64
    fi'
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "$@" \
    bash -c "$check" check "$folder" "$python"
  local code=$?
  [ "$code" = 0 ] || finish "$code"
}

# Whatever may end otherwise another time is requeued; count_start bounds that.
finish() {
  local code=$1
  log "ended with exit code $code; newest checkpoint: $(newest)"
  case " $final " in *" $code "*) exit "$code" ;; esac
  if [ -e "$folder/$job.cancelled" ]; then
    log "cancelled; to go on: python -m launch.slurm resume $run"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    log "requeued"
  else
    log "cannot be requeued; to go on: python -m launch.slurm resume $run"
  fi
  exit "$code"
}
