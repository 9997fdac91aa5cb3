# shellcheck shell=bash
# What follows is the same for one node and for thousands, for one run and for each task of an array.

arguments+=("$@")  # sbatch SCRIPT key=value ...
restart=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
if [[ -n $index ]]; then
    # By its array name: the plain number of an array's last task is the number of the whole array.
    job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    IFS=$'\t' read -r -a point < <(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$index")
    folder=${point[0]}
    arguments+=("${point[@]:1}")
fi
logs=$folder/logs/$job-$restart
say() { echo "$(date --utc +%FT%TZ) $job restart $restart: $*"; }
if ! mkdir -p "$logs" || ! touch "$logs"; then
    say "refused: $folder cannot be written to"
    exit 2
fi

finished=$folder/logs/$job.finished  # this job's own: another, a pre-flight say, may use the folder too
if ((restart == 0)); then
    rm -f "$finished"
elif [[ -e $finished ]]; then
    say "the run has finished; nothing is left to do"
    exit 0
fi
cp -- "$0" "$logs/job.sbatch"
if ((SLURM_NTASKS % SLURM_JOB_NUM_NODES)); then
    say "refused: $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes; ask for as many on each, with --ntasks-per-node"
    exit 2
fi
arguments+=("trainer.num_nodes=$SLURM_JOB_NUM_NODES" "trainer.devices=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))")
arguments+=("exp_manager.explicit_log_dir=$folder")

# The address by which SLURM itself reaches the first node, where rank 0 and this script run: names need not resolve.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
[[ $(scontrol --oneliner show node "${nodes[0]}") =~ NodeAddr=([^ ]+) ]]
export MASTER_ADDR=${BASH_REMATCH[1]}
# Below the ports that systems give to outgoing connections; another for each job and restart; the first that is free.
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + restart) % 12000))
while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

inside=()
if [[ -n $container_image ]]; then
    inside+=("--container-image=$container_image" --no-container-entrypoint)
    [[ -z $container_mounts ]] || inside+=("--container-mounts=$container_mounts")
    [[ -z $container_workdir ]] || inside+=("--container-workdir=$container_workdir")
    # Of a variable that the image sets too, the image's value would win.
    inside+=("--container-env=MASTER_ADDR,MASTER_PORT${exported:+,$exported}")
fi
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || inside+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun does not inherit it

# One task first: a mistake that can be found without the other ranks ends here, and is not tried again.
say "checking the configuration; its record and the logs are in $logs"
code=0
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${srun_options[@]}" "${inside[@]}" \
    "$python" -m nemo_tied_lora.commands.record "$logs" "${arguments[@]}" || code=$?
if ((code == 2)); then
    say "refused; not started"
    exit 2
fi

# SLURM sends SIGTERM to this script too, when the job is cancelled, preempted or requeued: the ranks come first.
told=''
trap 'told=yes; say "SIGTERM: waiting for the ranks"' TERM
if ((code == 0)); then
    say "starting $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes"
    # shellcheck disable=SC2016 # each task expands its own variables
    srun --kill-on-bad-exit=1 --wait=60 --label --open-mode=append --output="$logs/node-%n.log" \
        "${srun_options[@]}" "${inside[@]}" bash -c '
            export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID NODE_RANK=$SLURM_NODEID
            exec "$@"' rank "$python" -m nemo_tied_lora.commands.finetune "${arguments[@]}" &
    ranks=$!
    wait "$ranks" || code=$?
    while kill -0 "$ranks" 2>/dev/null; do  # a signal ended the waiting, not the ranks
        code=0
        wait "$ranks" || code=$?
    done
fi

if [[ $code == 0 && -n $told ]]; then
    code=143  # srun, which got the signal too, says 0 where it gave up waiting for its ranks
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
for _ in 1 2 3; do  # a SIGTERM ends squeue too, and a busy controller may not answer at once
    state=$(squeue --noheader --jobs="$job" --format=%T) && break
    sleep 3
done
if [[ $state != RUNNING ]]; then
    say "ended from outside (${state:-no longer known to SLURM}), exit code $code"
elif ((restart < max_requeues)); then
    say "exit code $code: requeued to go on from the last checkpoint, $((max_requeues - restart)) times more at most"
    scontrol requeue "$job"
else
    say "exit code $code after $restart restarts: not requeued again (max_requeues=$max_requeues)"
fi
exit "$code"
