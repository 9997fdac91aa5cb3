# shellcheck shell=bash
# The rest is the same for one node and for thousands, for one run and for each task of an array.

arguments+=("$@")  # sbatch SCRIPT key=value ...
restart=${SLURM_RESTART_COUNT:-0}
job=${SLURM_JOB_ID:-}
say() { echo "$(date --utc +%FT%TZ) $job restart $restart: $*"; }
refuse() {
    say "refused: $*"
    exit 2
}
[[ -n $job ]] || refuse "SLURM_JOB_ID is not set: this is a job's script; submit it with sbatch"
[[ ${SLURM_HET_SIZE:-1} == 1 ]] || refuse "a heterogeneous job (SLURM_HET_SIZE=$SLURM_HET_SIZE): all nodes must hold the same" \
    "number of ranks; leave the second group out"
# Which of these variables sbatch sets depends on its options and its version. "8(x2)" is even, "8(x2),4" is not.
num_nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
each=${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-0}}
tasks=${SLURM_NTASKS:-${SLURM_NPROCS:-$((num_nodes * ${each%%[!0-9]*}))}}
if ((tasks == 0 || tasks % num_nodes)) || [[ ${SLURM_TASKS_PER_NODE:-} == *,* ]]; then
    refuse "$tasks tasks on $num_nodes nodes${SLURM_TASKS_PER_NODE:+ ($SLURM_TASKS_PER_NODE)}; ask for the same number on each," \
        "with --ntasks-per-node"
fi
task=${SLURM_ARRAY_TASK_ID:-}
if [[ -n $index ]]; then
    [[ -n $task ]] || refuse "index=$index, but the job is not an array; submit it with --array=0-N, or set index=''"
    # The array name, because the plain job number of an array's last task is the number of the whole array.
    job=${SLURM_ARRAY_JOB_ID}_$task
    line=$(sed -n "$((task + 1))p" "$index" 2>/dev/null) || refuse "index=$index: cannot be read; give one line per task"
    folder=${line%%$'\t'*}
    [[ -n $folder ]] || refuse "index=$index: line $((task + 1)), for array task $task, does not begin with a run's folder; add it," \
        "or submit fewer tasks"
    IFS=$'\t' read -r -a point <<<"$line"
    arguments+=("${point[@]:1}")
elif [[ -n $task ]]; then
    refuse "a job array, but index='': all tasks would write into folder=$folder; name a file with one line per task: its" \
        "folder, then its arguments, separated by tabs"
fi
[[ -n $folder ]] || refuse "folder='': name the run's folder"
[[ -z $container_image || $folder == /* ]] || refuse "folder=$folder: inside the container this would be another one;" \
    "name an absolute path that container_mounts shows at the same place"
logs=$folder/logs/$job-$restart
if ! mkdir -p "$logs" || ! touch "$logs"; then
    refuse "$folder cannot be written to"
fi

finished=$folder/logs/$job.finished  # named after the job: another job, such as a pre-flight, may use the folder too
if ((restart == 0)); then
    rm -f "$finished"
elif [[ -e $finished ]]; then
    say "the run has finished; nothing is left to do"
    exit 0
fi
cp -- "$0" "$logs/job.sbatch"
if [[ -n $script ]]; then
    arguments=(--folder "$folder" "${arguments[@]}")
    first_step=(env "WORLD_SIZE=$tasks" "$python" "$script" --check "$logs")
    each_rank=("$python" "$script")
else
    arguments+=("trainer.num_nodes=$num_nodes" "trainer.devices=$((tasks / num_nodes))")
    arguments+=("exp_manager.explicit_log_dir=$folder")
    first_step=("$python" -m nemo_tied_lora.commands.record "$logs")
    each_rank=("$python" -m nemo_tied_lora.commands.finetune)
fi

# Rank 0 and this script run on the first node. SLURM's own address of it works even if host names do not resolve.
SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ $(scontrol --oneliner show node "${nodes[0]:-}") =~ NodeAddr=([^ ]+) ]] ||
    refuse "scontrol does not know the address of ${nodes[0]:-the first node} (SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST)"
export MASTER_ADDR=${BASH_REMATCH[1]}
# Below the ports of outgoing connections, different for each job and restart, and free.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + restart) % 12000))
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

inside=()
if [[ -n $container_image ]]; then
    inside+=("--container-image=$container_image" --no-container-entrypoint)
    [[ -z $container_mounts ]] || inside+=("--container-mounts=$container_mounts")
    [[ -z $container_workdir ]] || inside+=("--container-workdir=$container_workdir")
    # Without this, the image's value of a variable would win.
    inside+=("--container-env=MASTER_ADDR,MASTER_PORT${exported:+,$exported}")
    # This file was written outside. If it is not there inside, what the ranks write would be lost with the container.
    # shellcheck disable=SC2016 # expanded inside
    first_step=(bash -c '[[ -e $0 ]] && exec "$@"
        echo "refused: $0 is not there inside the container; let container_mounts show the run'\''s folder at the same place"
        exit 2' "$logs/job.sbatch" "${first_step[@]}")
fi
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || inside+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun does not inherit it

# One task first: a mistake that it can find ends the job here, without a restart.
say "checking the configuration; its record and the logs are in $logs"
code=0
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" "${inside[@]}" \
    "${first_step[@]}" "${arguments[@]}" || code=$?
if ((code == 2)); then
    say "refused; not started"
    exit 2
fi
# From 128 on, a signal ended it. Below, srun, Python or the program failed, and would fail again: a wrong image, a missing
# module, a bug. If an earlier start got as far as the ranks, the cause is rather this start's nodes: the job is requeued.
if ((code > 0 && code < 128)) && ! compgen -G "$folder/logs/$job-*/node-*.log" >/dev/null; then
    say "exit code $code before any rank has started: not requeued, because it would repeat; see the lines above"
    exit "$code"
fi

# SLURM sends SIGTERM to this script too, if the job is cancelled, preempted or requeued. The script waits for the ranks.
terminated=''
trap 'terminated=yes; say "SIGTERM: waiting for the ranks"' TERM
if ((code == 0)); then
    say "starting $tasks ranks on $num_nodes nodes"
    # shellcheck disable=SC2016 # each task expands its own variables
    srun --nodes="$num_nodes" --ntasks="$tasks" --ntasks-per-node="$((tasks / num_nodes))" \
        --kill-on-bad-exit=1 --wait=60 --label --open-mode=append --output="$logs/node-%n.log" \
        "${srun_options[@]}" "${inside[@]}" bash -c '
            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
            exec "$@"' rank "${each_rank[@]}" "${arguments[@]}" &
    ranks=$!
    wait "$ranks" || code=$?
    while kill -0 "$ranks" 2>/dev/null; do  # a signal ended only the waiting
        code=0
        wait "$ranks" || code=$?
    done
fi

if [[ $code == 0 && -n $terminated ]]; then
    code=143  # srun got the signal too, and returns 0 if it stopped waiting for its ranks
fi
if ((code == 0)); then
    touch "$finished"
    say "finished"
    exit 0
fi
if ((code == 2)); then
    say "refused by the ranks; not tried again"
    exit 2
fi
state=''
for _ in 1 2 3; do  # SIGTERM may end squeue too, and a busy controller may not answer at once
    state=$(squeue --noheader --jobs="$job" --format=%T) && break
    sleep 3
done
if [[ $state != RUNNING ]]; then
    say "ended from outside (${state:-no longer known to SLURM}), exit code $code"
elif ((restart < max_requeues)); then
    say "exit code $code: requeued to resume from the last checkpoint, at most $((max_requeues - restart)) more times"
    scontrol requeue "$job"
else
    say "exit code $code after $restart restarts: not requeued again (max_requeues=$max_requeues)"
fi
exit "$code"
