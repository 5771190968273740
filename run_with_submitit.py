"""Pretrain in a Slurm job that saves and requeues itself before it is preempted or reaches its time limit.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch vit_small \\
        --data_path /path/to/imagenet/train --output_dir output/vits16
    python run_with_submitit.py main_dinov2.py @presets/dinov2_vitl16_short.txt --nodes 4 --ngpus 8 --partition gpu ...

Also accepts every flag of main_dino.py, or of the script named first, and @presets. `--cluster local --ngpus 2` starts
the processes on this host.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import flags
import main_dino
import main_dinov2
import parallel
from imagesets.sources import open_images
from parallel import Refused
from pretraining.faults import TO_BE_CONTINUED

SCRIPTS = {"main_dino.py": main_dino, "main_dinov2.py": main_dinov2}


def get_args_parser(script: str = "main_dino.py") -> argparse.ArgumentParser:
    parser = SCRIPTS[script].get_args_parser()
    parser.description = f"Pretrain a backbone in a Slurm job. Flags: those of {script}, and the group `job` below."
    parser.add_argument("script", nargs="?", choices=tuple(SCRIPTS), default=script,
        help="first argument: the script that trains; its flags are accepted")
    add = parser.add_argument_group("job").add_argument
    add("--cluster", choices=("slurm", "local", "debug"), default="slurm",
        help="slurm: submit a job; local: start processes on this host; debug: train in this process")
    add("--nodes", type=flags.positive_int, default=2, help="number of hosts")
    add("--ngpus", type=flags.positive_int, default=8,
        help="GPUs per host, each with one process; with --device cpu, processes per host")
    add("--timeout", type=flags.positive_int, default=2800,
        help="time limit of the job in minutes, at most the partition's; at the limit it saves and is requeued")
    add("--max_timeouts", type=flags.count, default=30, help="maximum number of times that the job is requeued")
    add("--signal_delay", type=flags.positive_int, default=120,
        help="seconds before the time limit or a preemption at which Slurm signals the job to save; raise it if a step "
             "and a checkpoint take longer")
    add("--cpus_per_task", type=flags.positive_int, default=10,
        help="CPU cores per process; give one for each of --num_workers")
    add("--mem", type=flags.non_negative, help="memory per host in GB; 0: all of it; default: 40 per process")
    add("--partition", help="Slurm partition")
    add("--account", help="Slurm account to charge")
    add("--qos", help="Slurm quality of service")
    add("--constraint", help="features that the hosts must have")
    add("--comment", help="comment on the job")
    add("--use_volta32", action="store_true", help="same as --constraint volta32gb")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE",
        help="other options of sbatch, such as exclude=node7 exclusive. With array=0-4 (or 0-4%%1: one task at a time) "
             "%%a in a flag stands for the task's number: --seed %%a --output_dir output/seed%%a")
    add("--job_dir", help="folder for the job's logs; %%j stands for the job's number; default: jobs/ in --output_dir")
    return parser


# ---- Runs in the job ----


class Training:
    """The callable that every process of the job runs, and that submitit requeues."""

    script = "main_dino.py"  # of jobs that were submitted before there was another one

    def __init__(self, folder: str, script: str) -> None:
        self.folder = folder  # folder of the scripts; the job starts in the folder it was submitted from
        self.script = script

    def __call__(self, args: argparse.Namespace) -> int:
        """Train to the end, or until the run has saved and the job is requeued.

        Slurm warns with SIGUSR2, upon which submitit requeues the job immediately, in the middle of a step. Therefore
        SIGUSR2 is intercepted: the run is asked to save and stop after its current step (SIGUSR1), and submitit's
        handler is called afterwards. Before training has installed its own SIGUSR1 handler there is nothing to save,
        and submitit's handler is called immediately.
        """
        sys.path.insert(0, self.folder)
        script = importlib.import_module(self.script.removesuffix(".py"))
        requeue, warnings = signal.getsignal(signal.SIGUSR2), []

        def ask_to_save(number: int, frame) -> None:
            warnings.append(number)
            signal.raise_signal(signal.SIGUSR1)

        if callable(requeue):
            signal.signal(signal.SIGUSR1, lambda number, frame: requeue(signal.SIGUSR2, frame))
            signal.signal(signal.SIGUSR2, ask_to_save)
        code = script.main(with_job_number(args))
        if code == TO_BE_CONTINUED and callable(requeue) and (warnings or still_running()):
            requeue(signal.SIGUSR2, None)  # does not return in the first process, and does nothing in the others
        elif code not in (0, TO_BE_CONTINUED):
            raise RuntimeError(f"{self.script} ended with exit code {code}: the reason is printed above, or by another "
                               "process")
        return code

    def checkpoint(self, args: argparse.Namespace):
        """Called by submitit: the job to requeue. It is the same call, which resumes from the run's checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, args)


def with_job_number(args: argparse.Namespace) -> argparse.Namespace:
    if "%j" not in args.output_dir:
        return args
    from submitit import JobEnvironment

    folder = args.output_dir.replace("%j", JobEnvironment().job_id)
    return argparse.Namespace(**vars(args) | {"output_dir": folder})


def still_running() -> bool:
    """Whether Slurm reports the job as running; asked by its first process only, False in the others.

    SIGTERM announces a preemption, after which the job must be requeued, or scancel, after which it must not be.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or os.environ.get("SLURM_PROCID") != "0":
        return False
    command = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    return "JobState=RUNNING" in subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()


# ---- Runs before the job ----


def parse(argv: list[str]) -> list[argparse.Namespace]:
    """The flags of each task of a job array, with %a replaced by its number; without an array, of the only task."""
    script = argv[0] if argv and argv[0] in SCRIPTS else "main_dino.py"
    args = get_args_parser(script).parse_args([word.replace("%a", "0") for word in argv])
    try:
        tasks, _ = array(sbatch_options(args.slurm))
    except Refused as error:
        get_args_parser().error(str(error))
    return [get_args_parser(script).parse_args([word.replace("%a", str(i)) for word in argv]) for i in range(tasks)]


def sbatch_options(words: list[str]) -> dict[str, str | bool]:
    """Parse the words of `--slurm`: KEY=VALUE, or KEY alone for an option without a value."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", key) or (equals and not value):
            raise Refused(f"--slurm {word}: give options of sbatch as KEY=VALUE, such as exclude=node7")
        options[key.replace("-", "_")] = value or True
    return options


MOST_TASKS = 10_000  # per job array; Slurm's own limit is 1001 unless its administrator raised it


def array(options: dict[str, str | bool]) -> tuple[int, int]:
    """(number of tasks of the job array, number that run at the same time); (1, 1) without an array."""
    if "array" not in options:
        return 1, 1
    match = re.fullmatch(r"0-(\d+)(?:%(\d+))?", str(options["array"]))
    if not match or match[2] == "0":
        raise Refused(f"--slurm array={options['array']}: give array=0-N, or array=0-N%P for P tasks at a time")
    tasks = int(match[1]) + 1
    if tasks > MOST_TASKS:
        raise Refused(f"--slurm array={options['array']}: more than {MOST_TASKS} tasks; submit several arrays")
    return tasks, int(match[2] or tasks)


def check(args: argparse.Namespace) -> None:
    """Find errors that would end the job at its start before it is queued.

    Raises:
        Refused: a flag is wrong.
    """
    script = SCRIPTS[args.script]
    script.check_args(args)
    supported = main_dino.with_supported_rate(args)
    if args.init_from:
        script.make_networks(supported)
    else:  # the backbone alone: the host that submits may have little memory
        script.make_backbone(args, supported.drop_path_rate)
    if getattr(args, "distill_from", ""):  # of main_dinov2.py
        script.matching_teacher(args)
    if args.device != "auto" and parallel.named_device(args.device).index is not None and args.ngpus > 1:
        raise Refused(f"--device {args.device}: --ngpus {args.ngpus} processes would share that GPU; use cuda")
    if args.replay:
        raise Refused(f"--replay {args.replay}: not possible in a job; run python {args.script} --replay here")
    flags.check_folder(args.output_dir)
    if args.job_dir:
        flags.check_folder(args.job_dir, "--job_dir")
    if args.cluster == "slurm" and args.signal_delay >= 60 * args.timeout:
        raise Refused(f"--signal_delay {args.signal_delay} s is as long as --timeout {args.timeout} minutes: the job "
                      "would be stopped as soon as it starts; lower it")
    if args.cluster != "slurm":
        if args.cluster == "local" and args.nodes > 1:
            raise Refused(f"--nodes {args.nodes}: --cluster local has one host; give --nodes 1")
        if "array" in sbatch_options(args.slurm):
            raise Refused(f"--slurm array: only Slurm has job arrays, not --cluster {args.cluster}; leave it out")
        for name, value in (("output_dir", args.output_dir), ("job_dir", args.job_dir)):
            if value and "%j" in value:
                raise Refused(f"--{name} {value}: the job's number is known in advance only to Slurm; leave %j out")
    if args.use_volta32 and args.constraint:
        raise Refused(f"--use_volta32 with --constraint {args.constraint}: give only --constraint "
                      f"'volta32gb&{args.constraint}'")
    path = args.data_path
    if re.fullmatch("((shapes|scenes)(:.*)?)?", path):
        open_images(path, None, args.in_chans)  # drawn images do not depend on the host, so they can be checked here
    elif not path.startswith("torchvision:") and not os.path.exists(path):
        print(f"--data_path {path} does not exist on this host; make sure that it exists on the job's hosts",
              flush=True)


def job_parameters(args: argparse.Namespace) -> dict:
    """The parameters of submitit's executor, from the flags of the job."""
    slurm = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "comment")}
    if args.use_volta32:
        slurm["constraint"] = "volta32gb"
    options = sbatch_options(args.slurm)
    tasks_at_once = array(options)[1]
    options.pop("array", None)
    return {
        "name": "dino",
        "nodes": args.nodes,
        "tasks_per_node": args.ngpus,
        "gpus_per_node": None if args.device == "cpu" else args.ngpus,
        "cpus_per_task": args.cpus_per_task,
        "mem_gb": 40 * args.ngpus if args.mem is None else args.mem,
        "timeout_min": args.timeout,
        "slurm_signal_delay_s": args.signal_delay,
        "slurm_array_parallelism": tasks_at_once,
        "slurm_srun_args": [f"--cpus-per-task={args.cpus_per_task}"],  # since Slurm 22.05, srun's default is one
        "slurm_additional_parameters": options,
        **{f"slurm_{name}": value for name, value in slurm.items() if value},
    }


def submit(tasks: list[argparse.Namespace]) -> list:
    """Check the flags and submit the job. Returns submitit's jobs, one per task of the array.

    Raises:
        Refused: bad input, Slurm is not installed here, or sbatch refuses the job.
    """
    # Training relies on submitit's default signal; the user may have set another one for other jobs.
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)
    args, folders = tasks[0], {os.path.abspath(task.output_dir) for task in tasks}
    check(args)
    for task in tasks[1:]:
        SCRIPTS[task.script].check_args(task)
    if len(folders) < len(tasks) and "%j" not in args.output_dir and array(sbatch_options(args.slurm))[1] > 1:
        raise Refused(f"--output_dir {args.output_dir}: the tasks of the array would write to it at the same time; "
                      "put %a into its name, or run one task at a time with array=0-N%1")
    submitit = parallel.import_optional("submitit", f"--cluster {args.cluster}", "submitit")
    job_dir = args.job_dir or os.path.join(os.path.commonpath(folders), "jobs")
    timeouts = {} if args.cluster == "debug" else {f"{args.cluster}_max_num_timeout": args.max_timeouts}
    try:
        executor = submitit.AutoExecutor(job_dir, args.cluster, **timeouts)
        flags.prepare_output(submitit.core.utils.JobPaths.get_first_id_independent_folder(job_dir), "--job_dir")
        executor.update_parameters(**job_parameters(args))
        run = Training(str(Path(__file__).resolve().parent), args.script)
        return executor.map_array(run, [training_flags(task) for task in tasks])
    except RuntimeError as error:  # no srun, or sbatch's refusal
        reason = " ".join(str(error).split()).rstrip(".")
        raise Refused(f"--cluster {args.cluster}: {reason}; correct the flags of the job, or give "
                      "--cluster local to run on this host") from error


def training_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the script, without those of the job; a checkpoint stores only the former."""
    names = vars(SCRIPTS[args.script].get_args_parser().parse_args([]))
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if k in names})


def submit_and_report(tasks: list[argparse.Namespace]) -> int:
    jobs = submit(tasks)
    for job, task in zip(jobs, tasks, strict=True):
        folder = task.output_dir.replace("%j", job.job_id)
        print(f"job {job.job_id}: checkpoints in {folder}, logs in {job.paths.stdout}", flush=True)
    return jobs[0].result() if tasks[0].cluster == "debug" else 0


def main(tasks: list[argparse.Namespace]) -> int:
    """Returns 0 once the job is submitted (with --cluster debug, the exit code of the run), 2 for bad input."""
    return flags.exit_code("run_with_submitit.py", submit_and_report, tasks)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:])))
