#!/bin/bash
#SBATCH --job-name=llama3_8b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --exclusive
# The folder has to be there before the job starts: mkdir -p logs
#SBATCH --output=logs/llama3_8b-%j.out
# All attempts write the same log, one after the other.
#SBATCH --open-mode=append
# After preemption and the loss of a node Slurm starts the job again, and the run goes on from its last save.
#SBATCH --requeue
# So many seconds before the time limit, or a minute earlier, the processes get SIGTERM and save,
# with exit code 75. With B: it would go to this script instead.
#SBATCH --signal=TERM@300

job=$SLURM_JOB_ID
# Beside the log: how often the job was restarted, and for each attempt how its processes ended.
record="$PWD"/logs/llama3_8b-$job
attempt=${SLURM_RESTART_COUNT:-0}
((attempt > 0)) || rm -rf "$record"
export notes="$record/attempt-$attempt"
mkdir -p "$notes" || exit 74
echo "job $job, attempt $attempt, on $SLURM_JOB_NODELIST"

# A set-up that fails ends the job.
set -e
source .venv/bin/activate
set +e
export NCCL_DEBUG=WARN

run=(train configs/llama3_8b.py)

# What srun runs for each process. When one fails, srun ends the others, which then fail too, and tells only
# the highest exit code. So each process notes its own, after a number: the lowest is the cause.
task() {
  # The program gets SIGTERM too, and saves; this shell stays, to note what came of that.
  local asked=0 order=40
  trap 'asked=50' TERM
  "$@"
  local code=$?                                   # an exception, unless it is
  [[ $code == @(2|3|65|70|74) ]] && order=10      # a failure that the program foresaw,
  ((code > 128 && code != 130)) && order=20       # a death by signal,
  ((code == 76)) && order=30                      # a stall,
  ((code == 134 || code == 143)) && order=50      # or how JAX and srun end the peers of a failed process.
  ((order += asked))                              # What comes after SIGTERM is rarely the cause.
  ((asked && code == 143)) && code=75             # It came before there was anything to save.
  ((code == 75)) && order=95                      # Saved: no failure at all.
  ((code == 0)) || echo "$order $code" >"$notes/$SLURM_PROCID"
  return "$code"
}
export -f task

# Without srun a process would find no peers. When one fails, the others get SIGTERM and then SIGKILL; so do
# those that are left a minute after the first was done.
srun --export=ALL --cpus-per-task=12 --label --kill-on-bad-exit=1 --wait=60 \
  bash -c 'task "$@"' task python -m llm_jax "${run[@]}"
code=$?

# The cause; where nobody could note anything, what srun says.
read -r _ code < <(cat "$notes"/* - 2>/dev/null <<<"99 $code" | sort -n)
again=
if ((code == 75)); then
  again="saved"
elif ((code == 76 || code > 128 && code != 130)); then
  restarts=$(cat "$record/restarts" 2>/dev/null || echo 0)
  if ((restarts < 3)); then
    echo $((++restarts)) >"$record/restarts"
    again="restart $restarts of 3"
  fi
fi
if [[ $again ]]; then
  echo "exit code $code: requeued ($again)"
  # Slurm ends this script when it requeues the job, sleep first. One that ends by itself would end it.
  scontrol requeue "$job" && { sleep 600; exit "$code"; }
fi
echo "exit code $code: the job ends"
((code == 0)) && rm -rf "$record"
exit "$code"
