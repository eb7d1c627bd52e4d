"""What `gream plan` prints: who runs where, and whether it fits into the machine's memory; nothing is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from cluster.bundles import ENGINE, LEARNER, REWARD, Bundle, bundles_of, nodes_for, what_is_missing
from cluster.memory_estimate import BYTES, CONTEXT_BYTES, GIB, ModelShape, engine_memory, learner_memory
from cluster.progress import console
from cluster.settings import MachineSettings, Settings
from item_index.input_error import InputError

# Memory that programs see, GiB.
GPU_MEMORY_GIB = {
    "A10G-24GB": 22.0, "RTX4090-24GB": 23.6, "L40S-48GB": 44.5, "A100-40GB": 39.4, "A100-80GB": 79.2,
    "H100-80GB": 79.6, "H200-141GB": 139.8, "B200-180GB": 178.0,
}  # fmt: skip
USABLE = 0.9  # the rest is for what allocators lose


def show_plan(settings: Settings) -> None:
    """Print placement and memory of the SRPO stage. Raises InputError that says what does not fit, and what to change,
    after all was printed."""
    machine, cluster, train = settings.machine, settings.cluster, settings.train
    if settings.model.checkpoint is None:
        raise InputError(
            "a model from scratch has the shape of its tokenizer too, which is not there yet",
            field="model.checkpoint", remedy="Name a checkpoint folder, or a model such as Qwen3-4B.",
        )  # fmt: skip
    shape = ModelShape.of_checkpoint(settings.model.checkpoint)
    bundles = bundles_of(
        cluster, engines=cluster.rollout_engines, learner_ranks=train.ranks, reward_workers=cluster.reward_workers
    )
    console.print(
        f"{settings.model.checkpoint}: {shape.parameters / 1e9:.2f} G parameters, {shape.layers} layers; "
        f"{machine.nodes} {'node' if machine.nodes == 1 else 'nodes'} of {_of_node(machine)}", highlight=False,
    )  # fmt: skip

    nodes: list[Mapping[str, float]] = [{"CPU": machine.cpus, "GPU": machine.gpus}] * machine.nodes
    missing = what_is_missing(bundles, nodes)
    places = nodes_for([bundle.resources for bundle in bundles], nodes)
    if places is not None:
        console.print(_placement_table(bundles, places))

    on_device, on_host = learner_memory(shape, train)
    engine = engine_memory(shape, cluster)
    per_gpu = cluster.gpus_per_engine > 0
    console.print(_memory_table(on_device, engine, on_host, per_gpu=per_gpu))
    console.print(_cache_line(settings, shape), highlight=False)
    if missing:
        raise InputError(f"the plan has no place on this machine: {missing}")
    assert places is not None
    for problem in _memory_problems(settings, bundles, places, on_device, engine, on_host):
        raise InputError(problem)
    console.print("It fits.")


def gpu_memory(machine: MachineSettings) -> float:
    """GiB of one GPU. Raises InputError that names the known ones."""
    if machine.gpu_memory_gib is not None:
        return machine.gpu_memory_gib
    if machine.gpu not in GPU_MEMORY_GIB:
        raise InputError(
            f"{machine.gpu} is none of the known GPUs {', '.join(GPU_MEMORY_GIB)}", field="machine.gpu",
            remedy="Take one of these, or set machine.gpu_memory_gib.",
        )  # fmt: skip
    return GPU_MEMORY_GIB[machine.gpu]


def _of_node(machine: MachineSettings) -> str:
    gpus = f", {machine.gpus} {machine.gpu} of {gpu_memory(machine):g} GiB" if machine.gpus else ""
    return f"{machine.cpus:g} CPUs, {machine.memory_gib:g} GiB{gpus}"


def _placement_table(bundles: list[Bundle], places: list[int]) -> Table:
    table = Table("node", "bundles", "of each", title="placement", title_justify="left")
    for (node, what), count in sorted(Counter((places[n], str(bundle)) for n, bundle in enumerate(bundles)).items()):
        table.add_row(str(node), str(count), what)
    return table


def _memory_table(
    learner: dict[str, int], engine: dict[str, int], on_host: dict[str, int], *, per_gpu: bool
) -> Table:  # fmt: skip
    where = "of its GPU" if per_gpu else "of the host"
    table = Table("memory, GiB", f"{LEARNER}, {where}", f"{ENGINE}, {where}", title="memory", title_justify="left")
    for name in [*learner, *(name for name in engine if name not in learner)]:
        table.add_row(name, _gib(learner.get(name)), _gib(engine.get(name)))
    table.add_section()
    table.add_row("together", _gib(sum(learner.values())), _gib(sum(engine.values())))
    for name, size in on_host.items():
        table.add_row(f"{name}, of the host", _gib(size), "")
    return table


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


def _cache_line(settings: Settings, shape: ModelShape) -> str:
    """How many responses the engine's key-value cache holds at once, at their longest."""
    cluster = settings.cluster
    tokens = cluster.kv_cache_mib * 2**20 * cluster.tensor_parallel // shape.cache_bytes(BYTES[cluster.dtype])
    longest = tokens // settings.train.reasoning_budget
    return (
        f"An engine's key-value cache holds {tokens:,} tokens: {longest} reasoning responses of "
        f"{settings.train.reasoning_budget} tokens, and it decodes {cluster.rollout_sequences} at once."
    )


def _memory_problems(
    settings: Settings, bundles: list[Bundle], places: list[int], learner: dict[str, int], engine: dict[str, int],
    on_host: dict[str, int],
) -> list[str]:  # fmt: skip
    """What does not fit, with what to change."""
    cluster, machine, problems = settings.cluster, settings.machine, []
    sizes = {LEARNER: sum(learner.values()), ENGINE: sum(engine.values()), REWARD: 0}
    host = [0] * machine.nodes
    limit = USABLE * gpu_memory(machine) * GIB if cluster.gpus_per_engine else 0.0
    for bundle, node in zip(bundles, places, strict=True):
        host[node] += sum(sum(on_host.values()) for process in bundle.processes if process.kind == LEARNER)
        if "GPU" not in bundle.resources:
            host[node] += sum(sizes[process.kind] for process in bundle.processes)
            continue
        wanted = sum(sizes[process.kind] + CONTEXT_BYTES for process in bundle.processes)
        if wanted > limit:
            names = " and ".join(process.kind for process in bundle.processes)
            problems.append(
                f"{names} need {wanted / GIB:.1f} GiB of a GPU that has {limit / GIB:.1f} to give ({USABLE:.0%} of "
                f"{gpu_memory(machine):g}): {_remedies(settings, bundle)}"
            )
    for node, wanted in enumerate(host):
        if wanted > USABLE * machine.memory_gib * GIB:
            problems.append(
                f"node {node} needs {wanted / GIB:.1f} GiB of memory and has {machine.memory_gib:g}: take larger "
                "nodes or more of them, or see what can be smaller in the table"
            )
    return problems


def _remedies(settings: Settings, bundle: Bundle) -> str:
    train, kinds = settings.train, {process.kind for process in bundle.processes}
    changes = []
    if LEARNER in kinds:
        if not train.gradient_checkpointing:
            changes.append("set train.gradient_checkpointing")
        changes.append("lower train.micro_batch_tokens")
        if train.zero_stage < 3 and train.low_rank is None:
            changes.append("raise train.zero_stage")
        if not train.offload_optimizer and train.zero_stage:
            changes.append("set train.offload_optimizer")
    if ENGINE in kinds:
        changes.append("lower cluster.kv_cache_mib")
    if len(kinds) > 1:
        changes.append("unset cluster.colocated")
    return ", or ".join(changes)
