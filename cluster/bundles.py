"""What the processes of a stage ask of a cluster: bundles of CPUs and GPUs, each of which has to fit on one node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.settings import ClusterSettings

ENGINE, LEARNER, REWARD = "rollout engine", "learner rank", "reward worker"
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Process:
    """An actor with resources of its own: its kind, its number among those of the kind, and its share of the bundle."""

    kind: str
    number: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Bundle:
    """Processes that are on one node, and on the same GPUs where their shares of them are parts."""

    processes: tuple[Process, ...]

    @property
    def resources(self) -> dict[str, float]:
        """What Ray reserves, by its names of resources."""
        gpus = sum(process.gpus for process in self.processes)
        return {"CPU": sum(process.cpus for process in self.processes), **({"GPU": gpus} if gpus else {})}

    def __str__(self) -> str:
        names = " + ".join(process.kind for process in self.processes)
        return f"{names} ({_amounts(self.resources)})"


def bundles_of(cluster: ClusterSettings, *, engines: int, learner_ranks: int, reward_workers: int = 0) -> list[Bundle]:
    """The bundles of rollout engines, learner ranks and reward workers: each its own, or with `cluster.colocated` pairs
    of rank and engine that share the GPUs, half of them each, so that Ray gives both processes the same. Reward workers
    without CPUs of their own (`cluster.reward_cpus`) have none."""
    gpus, paired = cluster.gpus_per_engine, min(engines, learner_ranks) if cluster.colocated else 0

    def rank(number: int, share: float) -> Process:
        return Process(LEARNER, number, cluster.learner_cpus, share)

    return [
        *(Bundle((rank(number, gpus / 2), _engine(cluster, number, gpus / 2))) for number in range(paired)),
        *(Bundle((rank(number, gpus),)) for number in range(paired, learner_ranks)),
        *(engine_bundle(cluster, number) for number in range(paired, engines)),
        *(
            Bundle((Process(REWARD, number, cluster.reward_cpus, 0),))
            for number in range(reward_workers if cluster.reward_cpus else 0)
        ),
    ]


def engine_bundle(cluster: ClusterSettings, number: int) -> Bundle:
    """The bundle of a rollout engine that shares nothing."""
    return Bundle((_engine(cluster, number, cluster.gpus_per_engine),))


def _engine(cluster: ClusterSettings, number: int, share: float) -> Process:
    return Process(ENGINE, number, cluster.rollout_cpus, share * cluster.tensor_parallel)


def nodes_for(wanted: Sequence[Resources], nodes: Sequence[Resources]) -> list[int] | None:
    """A node for each of the wanted resources, the largest first and each where it fits first; None without a way."""
    free = [dict(node) for node in nodes]
    order = sorted(range(len(wanted)), key=lambda n: (-wanted[n].get("GPU", 0), -wanted[n].get("CPU", 0)))
    places = [-1] * len(wanted)
    for number in order:
        for place, node in enumerate(free):
            if _fits(wanted[number], node):
                places[number] = place
                for name, amount in wanted[number].items():
                    node[name] = node.get(name, 0) - amount
                break
        else:
            return None
    return places


def what_is_missing(bundles: Sequence[Bundle], nodes: Sequence[Resources]) -> str:
    """Why bundles have no place on these nodes, whole as they are: what was asked, what exists, what to change; nothing
    where they have one."""
    if nodes_for([bundle.resources for bundle in bundles], nodes) is not None:
        return ""
    names = sorted({name for bundle in bundles for name in bundle.resources})
    asked = ", ".join(f"{count} x {text}" for text, count in Counter(map(str, bundles)).items())
    found = Counter(_amounts({name: node.get(name, 0) for name in names}) for node in nodes)
    exists = ", ".join(f"{count} x {text}" for text, count in found.items()) or "none"
    return f"asked for: {asked}; nodes: {exists}. {_reason(bundles, nodes, names)}"


def _reason(bundles: Sequence[Bundle], nodes: Sequence[Resources], names: Sequence[str]) -> str:
    for bundle in bundles:
        if not any(_fits(bundle.resources, node) for node in nodes):
            return f"No node is large enough for a {bundle}: {_remedy(bundle.resources, nodes)}"
    for name in names:
        total, have = (sum(part.get(name, 0) for part in parts) for parts in ([b.resources for b in bundles], nodes))
        if total > have:
            return f"{total:g} {name}s together, and there are {have:g}: lower {_settings_of(name)}, or add nodes"
    return "There is enough in all, but not in pieces of these sizes: make the bundles smaller, or the nodes larger"


def _remedy(wanted: Resources, nodes: Sequence[Resources]) -> str:
    short = [name for name in wanted if all(node.get(name, 0) < wanted[name] for node in nodes)] or sorted(wanted)
    return f"lower {' and '.join(_settings_of(name) for name in short)}, or take larger nodes"


def _settings_of(resource: str) -> str:
    return {
        "CPU": "cluster.learner_cpus, cluster.rollout_cpus, cluster.reward_cpus, train.ranks, cluster.rollout_engines "
        "or cluster.reward_workers",
        "GPU": "cluster.gpus_per_engine, cluster.tensor_parallel, train.ranks or cluster.rollout_engines",
    }.get(resource, resource)


def _fits(wanted: Resources, node: Resources) -> bool:
    return all(node.get(name, 0) >= amount - 1e-9 for name, amount in wanted.items())


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in resources.items())
